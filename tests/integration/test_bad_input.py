"""Bad input gives an error with the file, line or key and the remedy, exit code 2, and no file changed or left behind.

Most cases run launch/train.py on the pooled ranks (`in_ranks`); a few go through `deepspeed` to prove that the user
sees one message and no traceback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowrank_dist.cli.main import app
from tests.integration.launching import deepspeed, in_ranks, snapshot, write_config, write_jsonl
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import CHATML, make_tiny

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
# Files that a run may leave when it stops before its first step: its configuration, logs, and the reason.
TRACES = {"config.yaml", "checkpoints", "logs", "logs/rank-0.log", "logs/rank-1.log", "FAILED"}
QUERY = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Place:
    """A folder with everything that a run needs; each test breaks one thing in it."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def train(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def write(self, **changed: dict[str, Any]) -> None:
        """Write config.yaml, with some keys of some sections changed."""
        sections = {
            "model": {"path": self.base, "dtype": "fp32", "device": "cpu"},
            "lora": {"rank": 2, "targets": ["q_proj"]},
            "parallel": {"tensor": 2},
            "data": {"train": self.train, "max_length": 32},
            "train": {"steps": 3, "global_batch": 2},
            "output": {"dir": self.run, "tensorboard": False, "plot": False},
        }
        write_config(self.config, {name: {**keys, **changed.pop(name, {})} for name, keys in sections.items()})
        assert not changed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a base in one file and a base in several."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "whole": make_tiny("llama", folder / "whole", num_hidden_layers=1),
        "sharded": make_tiny("llama", folder / "sharded", num_hidden_layers=1, max_shard_size="60KB"),
    }


@pytest.fixture
def place(models: dict[str, Path], tmp_path: Path) -> Place:
    place = Place(tmp_path)
    shutil.copytree(models["whole"], place.base)
    write_jsonl(place.train, [{"prompt": "a", "completion": letter * 5} for letter in "bcde"])
    place.write()
    return place


def refused(place: Place, *arguments: object, left: frozenset[str] | set[str] = frozenset(), **options: bool) -> str:
    """Run on two ranks that must both end with exit code 2; return the message, which exactly one of them prints.

    left: names that may be new in the run folder. Everything else must be unchanged.
    """
    before = snapshot(place.root)
    outcomes = in_ranks(2, place.config, *arguments, **options)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    after = snapshot(place.root)
    assert {name: after.get(name) for name in before} == before, "something that lay there was changed"
    assert after.keys() - before.keys() <= ({"run", *(f"run/{name}" for name in left)} if left else set())
    (message,) = [outcome.stderr for outcome in outcomes if outcome.stderr]
    assert message.startswith("lowrank_dist: ") and message.count("lowrank_dist: ") == 1
    assert "Traceback" not in message
    return message.removeprefix("lowrank_dist: ").rstrip("\n")


def test_the_unspoiled_place_trains(place: Place) -> None:
    """Negative control of all tests below: without the one broken thing the run trains."""
    before = snapshot(place.root)
    for outcome in in_ranks(2, place.config):
        assert (outcome.code, outcome.stderr) == (0, "")
    after = snapshot(place.root)
    assert before.items() <= after.items() and "run/adapter/adapter_model.safetensors" in after


# --- configuration ---------------------------------------------------------------------------------------------------


def test_unknown_and_misspelt_keys(place: Place) -> None:
    place.write(lora={"rnak": 4}, train={"momentum": 0.9})
    lines = refused(place, "modle.path=x", left=set()).split("\n")
    text = place.config.read_text().split("\n")
    at = {key: f"{place.config}:{1 + next(i for i, line in enumerate(text) if key in line)}" for key in ("rnak", "mom")}
    assert any(line.startswith(f"{at['rnak']}: lora.rnak: unknown key; did you mean lora.rank?") for line in lines)
    assert any(line.startswith(f"{at['mom']}: train.momentum: unknown key; ") for line in lines)
    assert any(line.startswith("command line: modle: unknown key; did you mean model?") for line in lines)


def test_wrong_types(place: Place) -> None:
    place.write(lora={"rank": "eight"})
    lines = refused(place, "train.lr=fast", "--engine.zero_stage", "0", left=set()).split("\n")
    assert len(lines) == 3, "one line a mistake, all at once"
    assert re.match(
        rf"{re.escape(str(place.config))}:\d+: lora\.rank: 'eight' is not valid, .*from 1 to 1024", lines[0]
    )
    assert any(line.startswith("command line: train.lr: 'fast' is not valid") for line in lines)
    assert any(line.startswith("command line: engine.zero_stage: 0 is not valid") for line in lines)


def test_no_launcher(place: Place) -> None:
    message = refused(place, left=set(), launcher=False)
    assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set" in message
    assert "deepspeed --num_gpus N launch/train.py" in message


@pytest.mark.parametrize(
    ("override", "wanted"), [("parallel.tensor=3", "tensor=3 does"), ("parallel.data=2", "tensor=2 × parallel.data=2")]
)
def test_ranks_that_do_not_fit(place: Place, override: str, wanted: str) -> None:
    message = refused(place, override, left=set())
    assert wanted in message and "does not fit 2 ranks" in message and "parallel.tensor may be 1, 2" in message


def test_the_sizes_that_are_suggested_divide_ranks_and_model(place: Place) -> None:
    """With 9 heads the model can be cut in 1, 3 or 9, and 2 ranks in 1 or 2."""
    shutil.rmtree(place.base)
    make_tiny("llama", place.base, num_hidden_layers=1, hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    for tensor, said in ((3, "parallel.tensor may be 1; leave"), (2, "use one of 1 on 2 ranks")):
        assert said in refused(place, f"parallel.tensor={tensor}", left=set())


def test_an_output_folder_that_holds_a_run(place: Place) -> None:
    for held in ("config.yaml", "metrics.jsonl", "adapter/adapter_config.json", "checkpoints/step-1/kept"):
        path = place.run / held
        path.parent.mkdir(parents=True)
        path.write_text("an earlier run's")
        message = refused(place, left=set())
        assert f"{place.run} already has a run ({held.split('/')[0]})" in message
        assert "train.resume=auto, choose another output.dir" in message
        shutil.rmtree(place.run)
    place.run.write_text("a file")
    assert f"{place.run} is a file; choose a folder" in refused(place, left=set())


def test_other_files_in_the_output_folder_are_kept(place: Place) -> None:
    """A folder made beforehand, say for the output of a batch system, is not a run."""
    place.run.mkdir()
    (place.run / "slurm-1.out").write_text("queued")
    for outcome in in_ranks(2, place.config):
        assert outcome.code == 0, outcome.stderr
    assert (place.run / "slurm-1.out").read_text() == "queued"


# --- model folder ----------------------------------------------------------------------------------------------------


def edit_json(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def edit_weights(base: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    edit(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_model_folder(place: Place) -> None:
    message = refused(place, f"model.path={place.root / 'nowhere'}")
    assert f"{place.root / 'nowhere'}: no such folder; give a local Hugging Face model folder" in message
    assert "hf download" in message


@pytest.mark.parametrize(
    ("missing", "wanted"),
    [
        ("config.json", "config.json: missing; a Hugging Face model folder has one, so download the model completely"),
        ("model.safetensors", "base: has neither model.safetensors nor model.safetensors.index.json; download"),
        ("tokenizer.json", "base: has neither tokenizer.json nor tokenizer.model; set data.tokenizer to"),
    ],
)
def test_half_a_model_folder(place: Place, missing: str, wanted: str) -> None:
    (place.base / missing).unlink()
    assert wanted in refused(place)


def test_half_a_weights_file(place: Place) -> None:
    path = place.base / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refused(place)
    assert f"{path}: truncated or not a safetensors file" in message and "download it again" in message


def test_only_pickled_weights(place: Place) -> None:
    (place.base / "model.safetensors").rename(place.base / "pytorch_model.bin")
    message = refused(place)
    assert "has only pickled weights (pytorch_model.bin), which can run code" in message and "convert" in message


def test_an_index_that_names_an_absent_shard(place: Place, models: dict[str, Path]) -> None:
    shutil.rmtree(place.base)
    shutil.copytree(models["sharded"], place.base)
    shards = sorted(place.base.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert f"{shards[1]}: missing; download the model completely (named by {INDEX})" in refused(place)


@pytest.mark.parametrize("outside", ["../outside.safetensors", "/tmp/outside.safetensors"])
def test_an_index_that_leads_outside(place: Place, models: dict[str, Path], outside: str) -> None:
    shutil.rmtree(place.base)
    shutil.copytree(models["sharded"], place.base)
    index = place.base / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    # The file exists and holds the tensor; it is refused for its location.
    shutil.copy(place.base / weight_map[QUERY], place.root / "outside.safetensors")
    edit_json(index, weight_map={**weight_map, QUERY: outside})
    message = refused(place)
    assert f"{index}: weight_map: {QUERY} is mapped to {outside!r}" in message and "in the model folder" in message


def test_a_tensor_of_the_wrong_shape(place: Place) -> None:
    edit_weights(place.base, lambda tensors: tensors.update({QUERY: torch.zeros(60, 64)}))
    message = refused(place)
    assert f"{place.base / 'model.safetensors'}: tensor {QUERY} has shape [60, 64]" in message
    assert "config.json asks for [64, 64]; use the config.json that belongs to these weights" in message


def test_a_tensor_of_the_wrong_type(place: Place) -> None:
    edit_weights(place.base, lambda tensors: tensors.update({QUERY: torch.zeros(64, 64, dtype=torch.int8)}))
    message = refused(place)
    assert f"tensor {QUERY} has dtype I8, not one of" in message and "use an unquantized checkpoint" in message


def test_missing_and_needless_tensors(place: Place) -> None:
    edit_weights(place.base, lambda tensors: tensors.update({"model.extra": tensors.pop(QUERY)}))
    message = refused(place)
    assert f"{place.base}: tensor {QUERY} [64, 64] is missing; download the model again" in message
    assert "tensor model.extra does not exist in a llama model" in message


def test_an_unsupported_architecture(place: Place) -> None:
    edit_json(place.base / "config.json", model_type="mamba")
    message = refused(place)
    assert f"{place.base / 'config.json'}: model_type 'mamba' is not supported; use a model of one of" in message
    assert "llama" in message and "gpt2" in message


def test_a_tensor_parallel_size_that_does_not_divide_the_heads(place: Place) -> None:
    shutil.rmtree(place.base)
    make_tiny("llama", place.base, num_hidden_layers=1, hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    message = refused(place)
    assert "parallel.tensor=2 does not divide this llama model (3 attention heads" in message
    assert message.endswith("use one of 1 on 2 ranks")


def test_longer_than_the_models_positions(place: Place) -> None:
    message = refused(place, "data.max_length=65")
    assert "data.max_length=65 is longer than the model's 64 positions" in message
    assert str(place.base / "config.json") in message and "use at most data.max_length=64" in message


# --- low-rank factors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("lora.targets=[q_proj, qproj]", "lora.targets: 'qproj' matches no linear of this llama model"),
        ("lora.targets=.*attention.*", "lora.targets: '.*attention.*' matches no linear"),
        ("lora.rank_pattern={c_attn: 4}", "lora.rank_pattern: 'c_attn' matches no linear"),
    ],
)
def test_a_target_that_matches_nothing(place: Place, override: str, wanted: str) -> None:
    message = refused(place, override)
    assert wanted in message
    assert "It has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj in 1 layers" in message


# --- data ------------------------------------------------------------------------------------------------------------


def test_what_the_files_say_in_vain_is_said_at_the_start(place: Place) -> None:
    """Config keys without effect, or unknown keys of the model: training continues and prints one line for each."""
    make_tiny("llama", place.base, dtype=torch.float16, num_hidden_layers=1, attention_dropout=0.5)
    start, unknown = place.root / "start", "unknown keys, which have no effect"
    for file in (place.base / "config.json", place.base / "tokenizer_config.json", start / "adapter_config.json"):
        if file.parent == start:  # trained on the base with its current content
            size = lambda module: (2, 4.0) if "q_proj" in module else None  # noqa: E731
            save_adapter(start, place.base, random_adapter(place.base, size))
        file.write_text(json.dumps({**json.loads(file.read_text()), "odd": 1}))
    outcomes = in_ranks(2, place.config, f"lora.init_from={start}", "model.dtype=auto")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    said = outcomes[0].stdout.split("\n")
    for line in (
        f"{place.base / 'config.json'}: dropout of the base is not applied: attention_dropout=0.5",
        f"{place.base / 'config.json'}: {unknown}: odd",
        f"{place.base}: stored in fp16, but runs in bf16; model.dtype=fp32 or --dtype fp32 keeps every bit",
        f"{place.base / 'tokenizer_config.json'}: {unknown}: odd",
        f"{start / 'adapter_config.json'}: {unknown}: odd",
    ):
        assert said.count(line) == 1, (line, said)


def test_no_data_file(place: Place) -> None:
    place.train.unlink()
    assert f": data.train: {place.train}: no such file; set data.train=FILE" in refused(place)


def test_malformed_lines(place: Place) -> None:
    good = {"prompt": "a", "completion": "b"}
    write_jsonl(place.train, [good, '{"prompt": "a", completion: "b"}', good, {"prompt": "a"}, '["a"]'])
    lines = refused(place).split("\n")
    assert [line.split(" ")[0] for line in lines] == [f"{place.train}:{number}:" for number in (2, 4, 5)]
    assert "malformed JSON at column 17" in lines[0] and "write one JSON object per line" in lines[0]
    assert "key 'completion' is missing" in lines[1] and "where an object is expected" in lines[2]


def test_malformed_line_of_the_eval_file(place: Place) -> None:
    path = write_jsonl(place.root / "eval.jsonl", [{"prompt": "a", "completion": "b"}, "oops"])
    assert refused(place, f"data.eval={path}").startswith(f"{path}:2: malformed JSON at column 1")


def test_some_samples_too_long(place: Place) -> None:
    """Samples that are too long are counted and reported, not refused."""
    write_jsonl(place.train, [{"prompt": "a", "completion": "b" * length} for length in (5, 40, 6, 50)])
    outcomes = in_ranks(2, place.config)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    told = f"{place.train}: 2 of 4 samples kept; 2 over 32 tokens dropped (longest 52; lines 2, 4)"
    assert told in outcomes[0].stdout.split("\n")


def test_all_samples_too_long(place: Place) -> None:
    write_jsonl(place.train, [{"prompt": "a", "completion": "b" * length} for length in (40, 50)])
    message = refused(place)
    assert message.startswith(f"{place.train}: 0 of 2 samples kept; 2 over 32 tokens dropped (longest 52; lines 1, 2)")
    assert "raise data.max_length (the longest sample has 52 tokens)" in message


def test_no_target_tokens(place: Place) -> None:
    write_jsonl(place.train, [{"messages": [{"role": "user", "content": "hello"}]}] * 2)
    message = refused(place)
    assert message.startswith(f"{place.train}: 0 of 2 samples kept; 2 without target tokens dropped (lines 1, 2)")
    assert "give them a completion or an assistant turn" in message


def test_a_template_whose_end_of_turn_is_never_trained(place: Place) -> None:
    roles = ("user", "assistant")
    write_jsonl(place.train, [{"messages": [{"role": role, "content": "hi"} for role in roles]}] * 2)
    for outcome in in_ranks(2, place.config, f"output.dir={place.root / 'with the end'}"):
        assert outcome.code == 0, outcome.stderr
    edit_json(place.base / "tokenizer_config.json", chat_template=CHATML.replace("<|im_end|>", ""))
    message = refused(place)
    assert message.startswith(
        f"{place.train}:1: with the chat template of {place.base} the model would never learn to end a turn"
    )
    assert "let the template end the turn with the EOS or another special token" in message


def test_a_tokenizer_of_another_model(place: Place) -> None:
    edit_json(place.base / "config.json", vocab_size=100)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_weights(place.base, lambda tensors, name=name: tensors.update({name: tensors[name][:100].clone()}))
    write_jsonl(place.train, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "then"}])
    message = refused(place)
    assert message.startswith(f"{place.train}:2: token ") and "vocabulary has 100 rows" in message
    assert "set data.tokenizer to the model's own" in message


# --- a loss that is not a number -------------------------------------------------------------------------------------


def test_a_loss_that_becomes_nan_stops_every_rank_at_the_same_step(place: Place) -> None:
    message = refused(place, "train.lr=1e30", "lora.targets=all-linear", left=TRACES | {"metrics.jsonl"})
    host = socket.gethostname()
    who = f"rank 0 on {host}, rank 1 on {host}"
    assert message.startswith(f"step 2: the loss is nan ({who}); training stops on every rank. Lower train.lr")
    for rank in (0, 1):
        log = (place.run / "logs" / f"rank-{rank}.log").read_text()
        assert "step 1: loss " in log and log.count("step 2: ") == 1 and f": {message}\n" in log
    record = (place.run / "FAILED").read_text()
    assert re.fullmatch(rf"rank [01] on {host} failed first, at step 2 in optimiser: {re.escape(message)}\n", record)
    assert [json.loads(line)["step"] for line in (place.run / "metrics.jsonl").read_text().splitlines()] == [1]


@pytest.mark.parametrize(
    ("tensor", "override", "wanted"),
    [
        ("mlp.down_proj", "data.eval=null", "step 1: the loss is nan (rank 0 on {host}, rank 1 on {host})"),
        ("mlp.down_proj", "data.eval={train}", "step 0: the eval loss is nan"),
        # PyTorch's attention on CPUs turns a query of NaN into an output of zeros, so only the gradient shows it.
        ("self_attn.q_proj", "data.eval=null", "step 1: a gradient is not finite"),
    ],
)
def test_a_base_with_a_nan_in_one_shard(place: Place, tensor: str, override: str, wanted: str) -> None:
    """The NaN lies in the second rank's shard alone; both ranks stop."""
    edit_weights(place.base, lambda tensors: tensors[f"model.layers.0.{tensor}.weight"][-1, -1].fill_(float("nan")))
    message = refused(place, override.format(train=place.train), left=TRACES | {"metrics.jsonl"})
    wanted = wanted.format(host=socket.gethostname())
    assert message.startswith(f"{wanted}; training stops on every rank")
    for rank in (0, 1):
        assert wanted in (place.run / "logs" / f"rank-{rank}.log").read_text()


# --- merge -----------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base(place: Place) -> None:
    adapter = save_adapter(place.root / "adapter", place.base, random_adapter(place.base))
    twin = make_tiny("llama", place.root / "twin", num_hidden_layers=1, seed=1)
    wider = make_tiny("llama", place.root / "wider", num_hidden_layers=1, intermediate_size=128)
    before = snapshot(place.root)
    for base, wanted in ((twin, "trained on another base than"), (wider, "has an update [out, in] = [96, 64]")):
        done = merge(base, adapter, place.root / "out")
        assert done.exit_code == 2 and done.stdout == "" and "Traceback" not in done.stderr
        assert done.stderr.startswith(f"error: {adapter}: ") and wanted in done.stderr
        assert str(base) in done.stderr and snapshot(place.root) == before
    assert merge(place.base, adapter, place.root / "out").exit_code == 0


def merge(base: Path, adapter: Path, out: Path) -> Result:
    return CliRunner().invoke(app, ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out)])


def test_a_rank_that_leaves_it_to_another_to_speak_ends_after_it(place: Place) -> None:
    """A rank that leaves the message to another rank ends after it.

    A launcher ends all ranks when one has ended, and would otherwise end the rank that has yet to print.
    """
    command = [sys.executable, "launch/train.py", str(place.config), "train.stesp=1"]
    streams = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def start(rank: str) -> subprocess.Popen[str]:
        return subprocess.Popen(command, env={**os.environ, "RANK": rank, "LOCAL_RANK": rank}, **streams)

    silent = start("1")
    time.sleep(2)  # the silent rank starts first
    speaker = start("0")
    try:
        _, said = speaker.communicate(timeout=60)
        assert speaker.returncode == 2 and "train.stesp: unknown key" in said
        assert silent.poll() is None
        assert silent.communicate(timeout=60) == ("", "") and silent.returncode == 2
    finally:
        silent.kill()


# --- what the user sees under the launcher ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        # Before the ranks have met, and after.
        ("train.stesp=1", "lowrank_dist: command line: train.stesp: unknown key; did you mean train.steps?"),
        ("lora.targets=[qproj]", "lowrank_dist: lora.targets: 'qproj' matches no linear of this llama model."),
    ],
    ids=["before the ranks meet", "after"],
)
def test_under_the_launcher(place: Place, override: str, wanted: str) -> None:
    """Two ranks, one message, no traceback, exit code 2 from `deepspeed` itself."""
    before = snapshot(place.root)
    outcome = deepspeed(2, place.config, override)
    assert outcome.code == 2
    assert outcome.stderr.startswith(wanted) and outcome.stderr.count("lowrank_dist: ") == 1
    assert "Traceback" not in outcome.stderr + outcome.stdout
    assert snapshot(place.root) == before, "a refused start leaves nothing behind"
