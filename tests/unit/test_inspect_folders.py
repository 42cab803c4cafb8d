"""`lowrank-dist inspect` on model and run folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GemmaConfig

from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import FAMILY_NAMES, make_tiny
from tests.unit.test_inspect import (
    WEIGHTS,
    assert_damage_reported,
    change,
    cut,
    elsewhere,
    facts_of,
    same_in_text_and_json,
    show,
    write,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "base", max_shard_size="60KB")


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name, seed in (("checkpoints/step-5", 1), ("checkpoints/step-10", 2), ("adapter", 2)):
        save_adapter(folder / name, base, random_adapter(base, seed=seed))
    for name, target in (("last", "step-10"), ("best", "step-5")):
        (folder / "checkpoints" / name).symlink_to(target)
    (folder / "config.yaml").write_text(
        f"model: {{path: {base}}}\nlora: {{rank: 3}}\ndata: {{train: a.jsonl}}\noutput: {{dir: {folder}}}\n"
    )
    records = [{"step": 0, "eval_loss": 5.0}, {"step": 5, "loss": 4.0}, {"step": 5, "eval_loss": 3.0}]
    records += [{"step": 10, "loss": 2.5}, {"step": 10, "eval_loss": 3.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_model_of_each_family(tmp_path: Path, family: str) -> None:
    folder = make_tiny(family, tmp_path / family, dtype=torch.bfloat16)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    facts = facts_of(folder)
    config = hf.config
    expected = (config.model_type, config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    assert tuple(facts[key] for key in ("family", "layers", "hidden", "heads")) == expected
    assert facts["parameters"] == hf.num_parameters() and list(facts["dtypes"]) == ["BF16"] and facts["shards"] == 1
    assert facts["tied_embeddings"] == config.tie_word_embeddings and facts["trainable_here"] is True
    assert facts["tokenizer"] == ["tokenizer.json"] and facts["chat_template_in"] == ["tokenizer_config.json"]
    assert facts["file_bytes"] == (folder / "model.safetensors").stat().st_size and 2 in facts["tensor_parallel_sizes"]


def test_model_that_cannot_be_trained_is_not_broken(model: Path) -> None:
    assert facts_of(model)["shards"] > 2
    GemmaConfig(num_hidden_layers=7).save_pretrained(model)
    facts = facts_of(model)
    assert facts["trainable_here"] is False and "gemma" in facts["why_not"]
    assert facts["layers"] == 7 and facts["parameters"] == 75456


def _index(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index)
        path.write_text(json.dumps(index))

    return write


def _twice(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    change(folder, lambda tensors: tensors.update({name: tensor}), second.name)


SHARD = "model-00002-of-00006.safetensors"
MODEL_FAULTS = {
    "no shard": (lambda folder: (folder / SHARD).unlink(), [SHARD, "missing"]),
    "cut shard": (cut(SHARD), [SHARD, "truncated"]),
    "tensor twice": (_twice, ["is also in"]),
    "unnamed tensor": (lambda folder: change(folder, lambda t: t.update(x=torch.ones(1)), SHARD), [SHARD, "tensor x"]),
    "unnamed shard": (
        lambda f: shutil.copy(f / SHARD, f / "model-00009-of-00006.safetensors"),
        ["00009", "not in model"],
    ),
    "tensor nowhere": (_index(lambda index: index["weight_map"].update(x=SHARD)), [SHARD, "tensor x"]),
    "tensor less": (_index(lambda index: index["weight_map"].pop("lm_head.weight")), ["lm_head.weight"]),
    "out of the folder": (_index(lambda index: index["weight_map"].update(x="../x.safetensors")), ["../x.safetensors"]),
    "other sizes": (write("config.json", '{"model_type": "llama", "num_hidden_layers": 1}'), ["config.json"]),
    "zero or not finite": (write("config.json", '{"model_type": "llama", "hidden_size": "x"}'), ["config.json"]),
    "no type": (write("config.json", '{"model_type": []}'), ["config.json", "model_type"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "missing"]),
    "deep config": (write("config.json", "[" * 100000), ["config.json"]),
    "tokenizer": (write("tokenizer_config.json", "{"), ["tokenizer_config.json"]),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_broken_model(model: Path, fault: str) -> None:
    assert_damage_reported(model, *MODEL_FAULTS[fault])


def test_run(run: Path, base: Path) -> None:
    code, text = show(run, "--json")
    report = json.loads(text)
    facts = report["facts"]
    assert code == 0 and report["kind"] == "run" and facts["config"]["lora"]["rank"] == 3
    assert [facts[key] for key in ("last_loss", "last_loss_step", "last_eval_loss")] == [2.5, 10, 3.5]
    assert [facts[key] for key in ("best_eval_loss", "best_eval_loss_step")] == [3.0, 5]
    assert (facts["last"], facts["best"], facts["base_matches"]) == ("step-10", "step-5", True)
    rows = [(row["folder"], row["is"], row["verifies"]) for row in report["tables"]["adapters"]]
    assert rows == [
        ("checkpoints/step-5", "best", True),
        ("checkpoints/step-10", "last", True),
        ("adapter", "", True),
    ]
    checkpoint = json.loads(show(run / "checkpoints" / "last", "--json")[1])
    assert (checkpoint["kind"], checkpoint["facts"]["step"]) == ("checkpoint", 10)
    # As after a kill during the write of a record.
    shutil.rmtree(run / "adapter")
    (run / "metrics.jsonl").open("a").write('{"step": 11, "lo')
    code, text = show(run)
    assert code == 0 and "cut off" in text and "not finished" in text


def _relink(target: str) -> Callable[[Path], Any]:
    def link(folder: Path) -> None:
        (folder / "checkpoints" / "last").unlink()
        (folder / "checkpoints" / "last").symlink_to(target)

    return link


RUN_FAULTS = {
    "dangling": (_relink("step-11"), ["last", "step-11"]),
    "out of the run": (_relink("/tmp"), ["last", "/tmp"]),
    "loop": (_relink("last"), ["last"]),
    "checkpoint": (cut(f"checkpoints/step-5/{WEIGHTS}"), ["step-5", WEIGHTS]),
    "adapter": (cut(f"adapter/{WEIGHTS}"), [f"adapter/{WEIGHTS}"]),
    "config": (write("config.yaml", "lora: {rnk: 3}"), ["config.yaml", "lora.rnk"]),
    "no config": (lambda folder: (folder / "config.yaml").unlink(), ["config.yaml", "missing"]),
    "linked config": (elsewhere("config.yaml"), ["config.yaml", "link to a file outside"]),
    "record": (write("metrics.jsonl", '{"step": 1}\n{"loss": 1}\n{"step": 2}\n'), ["metrics.jsonl:2", "step"]),
    "no record": (write("metrics.jsonl", "7\n" * 3), ["metrics.jsonl:1"]),
}


@pytest.mark.parametrize("fault", RUN_FAULTS)
def test_broken_run(run: Path, fault: str) -> None:
    assert_damage_reported(run, *RUN_FAULTS[fault])


@pytest.mark.parametrize("kind", ["model", "run"])
def test_text_and_json_say_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    same_in_text_and_json(request.getfixturevalue(kind))
