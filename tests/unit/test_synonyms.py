"""Other trainers' keys: errors on the config and on data rows suggest our key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from lowrank_dist.config import load_config
from lowrank_dist.config.reference import reference
from lowrank_dist.data.formats import FORMATS, read_jsonl
from lowrank_dist.data.keys import MESSAGE_KEYS as OUR_MESSAGE_KEYS
from lowrank_dist.data.keys import ROW_KEYS as OUR_ROW_KEYS
from lowrank_dist.errors import ConfigError, UserError
from lowrank_dist.sections.section import MethodName
from lowrank_dist.sections.synonyms import CONFIG_KEYS, MESSAGE_KEYS, METHODS, ROW_KEYS, of_config

REQUIRED = {"model": {"path": "base"}, "data": {"train": "t"}, "output": {"dir": "run"}}
KEYS = {key.name for section in reference() for key in section.keys}


def refusal(tmp_path: Path, values: dict[str, object], *overrides: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_table_names_keys_that_there_are() -> None:
    assert {synonym.ours for synonym in CONFIG_KEYS} - {None} <= KEYS and len(KEYS) > 50
    assert {synonym.ours for synonym in ROW_KEYS} - {None} <= OUR_ROW_KEYS.applied
    assert {synonym.ours for synonym in MESSAGE_KEYS} <= OUR_MESSAGE_KEYS.applied
    for table in (CONFIG_KEYS, ROW_KEYS, MESSAGE_KEYS):
        names = [synonym.theirs for synonym in table]
        assert len(names) == len(set(names))
        assert all(synonym.ours or synonym.note for synonym in table)
    # None of our own key names is listed as another trainer's key.
    assert not {synonym.theirs for synonym in CONFIG_KEYS} & {key.rpartition(".")[2] for key in KEYS}


@pytest.mark.parametrize(
    "theirs",
    [
        *("learning_rate", "r", "lora_r", "lora_alpha", "target_modules", "per_device_train_batch_size", "bf16"),
        *("gradient_accumulation_steps", "max_steps", "num_train_epochs", "warmup_ratio", "output_dir", "fp16"),
        *("max_seq_length", "cutoff_len", "model_name_or_path", "tensor-model-parallel-size", "micro-batch-size"),
        *("global-batch-size", "gradient_checkpointing", "LEARNING_RATE"),
    ],
)
def test_a_key_of_another_trainer_is_answered_with_ours(tmp_path: Path, theirs: str) -> None:
    synonym = of_config(theirs)
    assert synonym is not None and synonym.ours is not None
    said = f"did you mean {synonym.ours}? "
    hint = said + (f"({synonym.note}) " if synonym.note else "")
    for section in ("lora", "train", "model"):
        values = {**REQUIRED, section: {**REQUIRED.get(section, {}), theirs: 1}}
        assert f"{section}.{theirs}: unknown key; {hint.rstrip()}" in refusal(tmp_path, values).splitlines()[-1]
        assert "the keys of" not in refusal(tmp_path, values)
    assert f"{theirs}: unknown key; {hint.rstrip()}" in refusal(tmp_path, {**REQUIRED, theirs: 1})
    for override in ((f"{theirs}=1",), (f"--{theirs}", "1")):
        assert f"command line: {theirs}: keys are written section.key; {said.rstrip()}" in refusal(
            tmp_path, REQUIRED, *override
        )


def test_a_key_without_one_of_ours_says_why(tmp_path: Path) -> None:
    said = refusal(tmp_path, {**REQUIRED, "model": {"path": "base", "load_in_4bit": True}})
    assert "unknown key; not supported: the base is held in bf16 or fp32" in said and "the keys of" not in said
    said = refusal(tmp_path, {**REQUIRED, "adapter": "lora"})
    assert "adapter: not a mapping; did you mean method: lora? its keys are bottleneck, placement" in said
    for key, hint in (
        ("wandb", "not supported: there is TensorBoard (output.tensorboard)"),
        ("template", "leave it out: the tokenizer's own chat template is used"),
        ("do_train", "leave it out: a run trains"),
    ):
        assert f"{key}: unknown key; {hint}" in refusal(tmp_path, {**REQUIRED, key: True})
        assert f"data.{key}: unknown key; {hint}" in refusal(tmp_path, REQUIRED, f"data.{key}=x")
    # Controls: our misspelt key, and our key in another section, get the usual messages.
    assert "did you mean lora.rank? the keys of lora are" in refusal(tmp_path, REQUIRED, "lora.rnak=4")
    assert "did you mean train.lr?" in refusal(tmp_path, REQUIRED, "lr=4")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dora", "write method=lora lora.dora=true; expected: lora, full"),
        ("QLoRA", "not supported: the base is held in bf16 or fp32 and never quantised; write method=lora; expected"),
        ("prefix-tuning", "write method=prefix; expected: lora"),
        ("ia3", "not supported: the low-rank methods are LoRA, rsLoRA and DoRA; expected: lora"),
        ("lorra", "did you mean lora? expected: lora"),  # a control: our misspelt name
    ],
)
def test_a_method_of_another_name_is_answered_with_ours(tmp_path: Path, name: str, said: str) -> None:
    found = refusal(tmp_path, REQUIRED, f"method={name}")
    assert f"method: '{name}' is not valid; {said}" in found and found.count("adapter_h") == 1


def test_every_method_named_for_another_is_one_of_ours() -> None:
    named = {word for text in METHODS.values() for word in re.findall(r"method=(\w+)", text)}
    assert named <= set(get_args(MethodName)) and not METHODS.keys() & set(get_args(MethodName))


# Keys of the trainers' own examples that have our names, which are no mistakes.
_OURS = {"packing", "seed", "weight_decay", "warmup_steps", "rank_pattern", "alpha_pattern", "adapter"}
_PEFT = {"r", "lora_alpha", "lora_dropout", "target_modules", "bias", "task_type", "init_lora_weights"} | {
    *("layers_to_transform", "layers_pattern", "modules_to_save", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("rank_pattern", "alpha_pattern", "inference_mode", "peft_type", "base_model_name_or_path"),
}
_FACTORY = {"model_name_or_path", "trust_remote_code", "stage", "do_train", "finetuning_type", "lora_rank"} | {
    *("lora_target", "dataset", "template", "cutoff_len", "max_samples", "overwrite_cache", "plot_loss", "flash_attn"),
    *("preprocessing_num_workers", "dataloader_num_workers", "output_dir", "logging_steps", "save_steps", "report_to"),
    *("overwrite_output_dir", "save_only_model", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "bf16", "ddp_timeout", "val_size"),
    *("resume_from_checkpoint", "per_device_eval_batch_size", "eval_strategy", "eval_steps", "deepspeed", "packing"),
}
_AXOLOTL = {"base_model", "load_in_8bit", "load_in_4bit", "datasets", "dataset_prepared_path", "val_set_size"} | {
    *("output_dir", "adapter", "lora_model_dir", "sequence_len", "sample_packing", "pad_to_sequence_len", "lora_r"),
    *("lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules", "wandb_project", "wandb_entity"),
    *("wandb_watch", "wandb_name", "gradient_accumulation_steps", "micro_batch_size", "num_epochs", "optimizer"),
    *("lr_scheduler", "learning_rate", "bf16", "tf32", "gradient_checkpointing", "logging_steps", "flash_attention"),
    *("warmup_steps", "warmup_ratio", "weight_decay", "fsdp", "special_tokens", "deepspeed"),
}


@pytest.mark.parametrize("keys", [_PEFT, _FACTORY, _AXOLOTL])
def test_every_key_of_the_trainers_examples_is_answered(keys: set[str]) -> None:
    assert {key for key in keys if of_config(key) is None} <= _OURS


def test_the_keys_of_a_section_are_listed_once(tmp_path: Path) -> None:
    found = refusal(tmp_path, {**REQUIRED, "foo": 1, "bar": 1, "lora": {"x": 1, "rnak": 1, "y": 1}}).splitlines()
    said = [line.partition(": unknown key; ")[2] for line in found]
    assert said[0].startswith("the keys of lora are rank, ")
    assert said[1:3] == ["did you mean lora.rank?", "the keys of lora are listed above"]
    assert said[3].startswith("the keys at the top level are model, ")
    assert said[4:] == ["the keys at the top level are listed above"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"conversations": [{"from": "human", "value": "x"}]},
            "'conversations': did you mean 'messages'? its messages",
        ),
        (
            {"instruction": "a", "input": "", "output": "b"},
            "('instruction': did you mean 'prompt'? with the text of 'input' in it) ('output': did you mean 'compl",
        ),
        ({"instruction": "a", "input": "c", "output": "b"}, "('output': did you mean 'completion'?)"),
        ({"chosen": "a", "rejected": "b"}, "('chosen': there is no preference training)"),
        ({"promt": "a", "x": "b"}, "('promt': did you mean 'prompt'?); expected"),
        (
            {"messages": [{"from": "user", "value": "x"}]},
            "key 'messages[0].role' is missing (rename 'from' to 'role'?)",
        ),
        ({"messages": [{"role": "user", "value": "x"}]}, "[0].content' is missing (rename 'value' to 'content'?)"),
    ],
)
def test_a_row_of_another_format_is_answered_with_ours(tmp_path: Path, row: object, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    assert said in str(caught.value) and (FORMATS in str(caught.value) or "missing" in str(caught.value))
