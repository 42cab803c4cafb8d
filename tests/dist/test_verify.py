"""`lowrank-dist verify` on ranks: it passes for every family and method, and finds what is broken on purpose."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest

from lowrank_dist.cli.verify import FAULTS
from lowrank_dist.engine.zero import ZeroOptimiser
from tests.dist import ranks
from tests.dist.method_runs import METHODS
from tests.dist.ranks import run_ranks
from tests.tiny_models import FAMILY_NAMES, make_tiny

WORDS = ("the cat", "a dog", "an ant", "one hen and a rat")


@dataclass(frozen=True)
class Case:
    """One verification. method: a key of METHODS, or lora. changes: keys of the config, as overrides."""

    folder: str
    data: str
    method: str = "lora"
    tensor: int = 2
    sequence: bool = True
    fault: str | None = None
    changes: tuple[str, ...] = ()


class Watcher:
    def enter(self, phase: str, step: int | None = None) -> None:
        pass


def verify(case: Case) -> tuple[int, str]:
    """On one rank: return the exit code and what was printed."""
    from lowrank_dist.backend.select import select_backend
    from lowrank_dist.config.load import config_of
    from lowrank_dist.verify.job import verify_on

    method, section, options = METHODS.get(case.method, ("lora", "lora", {"rank": 4, "dropout": 0.1}))
    values: dict[str, Any] = {
        "model": {"path": case.folder, "device": str(ranks.device())},
        "data": {"train": case.data, "max_length": 48},
        "train": {"steps": 9, "global_batch": 8, "micro_batch": 2, "lr": 1e-2},
        "output": {"dir": "none"},
        **({section: options} if section else {}),
    }
    config = config_of(values, [f"method={method}", *case.changes])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        backend = select_backend(config.model.device, 0)
        code = verify_on(config, case.fault, ranks.topology(case.tensor, case.sequence), backend, Watcher())
    return code, printed.getvalue()


def outcome(world: int, case: Case) -> tuple[int, str]:
    """Return exit code and text of rank 0. The others have the same code, and print nothing."""
    found = run_ranks(world, verify, case)
    assert {code for code, _ in found} == {found[0][0]} and not any(text for _, text in found[1:])
    return found[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"prompt": f"{WORDS[i % 4]} {'x' * (i % 7)}:", "completion": WORDS[i % 3]} for i in range(24)]
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base, made = tmp_path_factory.mktemp("models"), {}

    def of(family: str) -> str:
        if family not in made:
            made[family] = str(make_tiny(family, base / family))
        return made[family]

    return of


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family(folders: Any, data: str, family: str) -> None:
    code, text = outcome(2, Case(folders(family), data))
    assert code == 0, text
    assert text.splitlines()[-1].startswith("verified: ") and "PEFT" in text


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dora_dropout"])
def test_every_method(folders: Any, data: str, name: str) -> None:
    code, text = outcome(2, Case(folders("llama"), data, name))
    assert code == 0, text


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (4, {"tensor": 2}),
        (2, {"tensor": 1, "changes": ("engine.zero_stage=2", "data.packing=true")}),
        (2, {"sequence": False, "changes": ("engine.recompute=full", "data.packing=true", "engine.kernels=plain")}),
        (2, {"changes": ("model.dtype=bf16", "lora.dora=true", "lora.targets=[1.self_attn.q_proj, down_proj]")}),
        (1, {"tensor": 1, "method": "full", "changes": ("model.dtype=bf16",)}),
        (2, {"method": "prompt"}),
        (2, {"method": "prompt", "sequence": False}),
    ],
)
def test_other_settings(folders: Any, data: str, world: int, case: dict[str, Any]) -> None:
    code, text = outcome(world, Case(folders("gemma3_text"), data, **case))
    assert code == 0, text


@pytest.mark.parametrize(("world", "fault"), [(world, fault) for world in (2, 4) for fault in FAULTS])
def test_every_planted_fault_is_found(folders: Any, data: str, world: int, fault: str) -> None:
    code, text = outcome(world, Case(folders("llama"), data, fault=fault))
    assert code == 1, text
    last = text.splitlines()[-1]
    where = {
        "deferred": "gradients, step 1 of model.layers.0.mlp.down_proj.lora_B",
        "qk": "inputs of linears of model.layers.0.self_attn.o_proj",
        "mask": "inputs of linears of model.layers.0.self_attn.o_proj",
        "norm": "inputs of linears of model.layers.0.self_attn.q_proj",
    }
    assert last.startswith(f"DIFFERS: first in {where[fault]} "), last


def test_a_fault_is_found_in_bf16(folders: Any, data: str) -> None:
    """A swapped head of 4 with the tolerance of bf16."""
    code, text = outcome(2, Case(folders("llama"), data, fault="qk", changes=("model.dtype=bf16",)))
    assert code == 1 and "inputs of linears of model.layers.0.self_attn.o_proj" in text.splitlines()[-1], text


def verify_with_other_rules(case: Case, name: str, value: object) -> tuple[int, str]:
    """On one rank: `verify` where the run's optimiser, and not the reference's, has another rule."""
    init = ZeroOptimiser.__init__

    def changed(self: Any, parameters: Any, topology: Any, rules: Any, *others: Any) -> None:
        init(self, parameters, topology, replace(rules, **{name: value}), *others)

    with mock.patch.object(ZeroOptimiser, "__init__", changed):
        return verify(case)


@pytest.mark.parametrize(("name", "value"), [("weight_decay", 0.0), ("betas", (0.9, 0.99)), ("clip", None)])
def test_a_fault_of_the_optimiser_is_found_at_a_small_rate(folders: Any, data: str, name: str, value: object) -> None:
    case = Case(folders("llama"), data, changes=("train.lr=1e-5", "train.weight_decay=0.1"))
    (code, text), _ = run_ranks(2, verify_with_other_rules, case, name, value)
    assert code == 1 and any(step in text.splitlines()[-1] for step in ("step 2", "step 3")), text


def test_a_fault_that_changes_nothing_is_refused(folders: Any, data: str) -> None:
    with pytest.raises(AssertionError, match=r"--plant deferred: no gradient is summed"):
        run_ranks(1, verify, Case(folders("llama"), data, tensor=1, fault="deferred"))
