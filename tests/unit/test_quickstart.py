"""The quickstart's data hides its eval verbs, its proof can fail, and its report names broken promises."""

import argparse
import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from launch.quickstart.evaluate import equal_texts, prove, score
from launch.quickstart.prepare import Verb, read_verbs, split
from launch.quickstart.report import MINE, NEXT, next_steps, shortened, shortfalls
from lowrank_dist.cli.main import app
from lowrank_dist.config.load import load_config
from lowrank_dist.errors import UserError
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow


def regular(lemma: str) -> Verb:
    return Verb(lemma, f"{lemma}s", f"{lemma}ed", f"{lemma}ed", f"{lemma}ing")


def test_verbs_have_one_spelling_of_every_form(tmp_path):
    lines = [
        "cat,noun,cats",
        "take,verb,took,taken,taking,takes",
        "walk,verb,walked,,walking,walks",
        "learn,verb,learned/learnt,,learning,learns",
        "E-mail,verb,E-mailed,,E-mailing,E-mails",
        "beware,verb,,,,",
    ]
    with gzip.open(tmp_path / "table.csv.gz", "wt") as table:
        table.write("\n".join(lines) + "\n")
    verbs = list(read_verbs(tmp_path / "table.csv.gz"))
    assert verbs == [Verb("take", "takes", "took", "taken", "taking"), regular("walk")]
    assert verbs[0].sample() == {"prompt": "Verb: take\nForms:", "completion": " takes, took, taken, taking"}


def test_no_word_of_an_eval_verb_is_in_train():
    verbs = [regular(lemma) for lemma in ("walk", "walked", "find", "finded", "play", "played")]
    train, evaluation = split(verbs, 1)
    assert words(evaluation).isdisjoint(words(train))
    # Each of these verbs has a twin that would give it away; without the rule only the hidden verb would be missing.
    assert len(evaluation) == 1 and len(train) == len(verbs) - 2


def words(verbs: list[Verb]) -> set[str]:
    return {word for verb in verbs for word in (verb.lemma, *verb.forms)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny base, an adapter with B != 0, the merged model and the probe with plain PEFT."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model.save_pretrained(folder / "base")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    model.save_pretrained(folder / "adapter")
    input_ids = torch.randint(0, 64, (2, 9))
    with torch.inference_mode():
        logits = model(input_ids).logits
    save_file({"input_ids": input_ids, "logits": logits}, folder / "probe.safetensors")
    model.merge_and_unload().save_pretrained(folder / "merged")
    (folder / "score.json").write_text("{}")
    return folder


def proof(folder: Path, **changed: Path) -> dict[str, float]:
    paths = {name: folder / name for name in ("base", "adapter", "merged")}
    paths |= dict.fromkeys(("base_score", "merged_score"), folder / "score.json")
    with pytest.MonkeyPatch.context() as patch:  # these folders have no tokenizer; the texts are tested elsewhere
        patch.setattr("launch.quickstart.evaluate.equal_texts", lambda model, scored: 0)
        return prove(argparse.Namespace(**{**paths, "probe": folder / "probe.safetensors", **changed}))


def test_proof_holds_for_true_outputs(trained):
    result = proof(trained)
    assert max(result["adapter"], result["merged"]) < 1e-5 and result["base"] > 0.1


def test_proof_fails_for_a_merge_that_changed_nothing(trained):
    with pytest.raises(UserError, match="logits of the merged differ"):
        proof(trained, merged=trained / "base")


def test_proof_fails_for_an_adapter_with_other_weights(trained, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes((trained / "adapter" / "adapter_config.json").read_bytes())
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    name = next(key for key in tensors if "q_proj.lora_B" in key)
    tensors[name] = tensors[name].roll(1, dims=0)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="logits of the adapter differ"):
        proof(trained, adapter=tmp_path)


def test_proof_fails_where_training_changed_nothing(trained, tmp_path):
    with torch.inference_mode():
        input_ids = load_file(trained / "probe.safetensors")["input_ids"]
        logits = LlamaForCausalLM.from_pretrained(trained / "base")(input_ids).logits
    save_file({"input_ids": input_ids, "logits": logits}, tmp_path / "probe.safetensors")
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "adapter_config.json").write_bytes((trained / "adapter" / "adapter_config.json").read_bytes())
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    zeros = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    save_file(zeros, blank / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="from the base's by only"):
        proof(trained, adapter=blank, merged=trained / "base", probe=tmp_path / "probe.safetensors")


@pytest.mark.parametrize(
    ("match", "loss", "missed"), [(0.15, 1.0, 0), (0.14, 1.0, 1), (0.15, 1.01, 1), (float("nan"), float("nan"), 2)]
)
def test_report_names_what_was_not_reached(match, loss, missed):
    report = {"exact_match": {"base": 0.0, "merged": match}, "loss": {"base": 2.0, "merged": loss}}
    assert len(shortfalls(report)) == missed


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a tiny model and the result of `score` on prompts of several lengths, which transformers pads."""
    folder = make_tiny("llama", tmp_path_factory.mktemp("scored") / "model")
    samples = [{"prompt": "walk " * length, "completion": " walks"} for length in (1, 4, 2)]
    data = folder.parent / "data.jsonl"
    data.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    result = score(argparse.Namespace(model=folder, data=data))
    assert result is not None and result["samples"] == 3
    return folder, result


def test_plain_transformers_writes_the_texts_that_were_scored(scored):
    folder, result = scored
    assert equal_texts(folder, result) == 3
    assert {one["reference"] for one in result["texts"]} == {" walks"} and result["loss"] > 0


def test_a_text_that_plain_transformers_does_not_write_fails_the_proof(scored):
    folder, result = scored
    texts = [*result["texts"][:2], {**result["texts"][2], "text": result["texts"][2]["text"] + "s"}]
    with pytest.raises(UserError, match="walk walk ' plain transformers writes"):
        equal_texts(folder, {**result, "texts": texts})


def test_a_text_is_shown_on_one_line():
    assert shortened(" a\nb ") == "a\\nb"
    assert shortened("x" * 20, 10) == "x" * 9 + "…"


@pytest.mark.parametrize("command", [command for _, command in NEXT if command.startswith("lowrank-dist")])
def test_next_steps_name_commands_and_options_that_exist(command):
    _, name, *arguments = shlex.split(command.format(out="OUT", mine=MINE))
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    options = [argument for argument in arguments if argument.startswith("--")]
    assert "Usage" in shown and [option for option in options if f"{option} " not in shown] == []


def test_next_steps_train_on_data_of_ones_own():
    config = load_config("configs/quickstart.yaml", MINE.split())
    assert config.data.eval is None and config.eval.every is None
    assert next_steps(Path("build/quickstart")).count(MINE) == 2
