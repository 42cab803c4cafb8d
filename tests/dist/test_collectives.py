"""No added collective: adapted layers issue the calls of frozen ones. No backward below the lowest adapted layer."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_dist.parallel.counting import CollectiveCount, count_collectives
from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.dist.tiny_runs import LENGTHS, Setting, microbatches
from tests.dist.tiny_runs import build as build_for_training
from tests.tiny_models import make_tiny

ROWS, LENGTH, HIDDEN, RANK = 2, 16, 64, 4
MODES = list(itertools.product((True, False), (False, True)))  # sequence parallel, recompute
FAMILIES = {
    "llama": ("llama", {}),
    "one_kv": ("llama", {"num_key_value_heads": 1}),
    "gpt2": ("gpt2", {}),
    "olmo2": ("olmo2", {}),
}
TARGETS = {
    "llama": ("all-linear", ["q_proj", "v_proj"], ["o_proj"], ["down_proj"]),
    "one_kv": ("all-linear", ["v_proj"]),
    "gpt2": ("all-linear", ["c_attn"], ["k_proj", "c_fc"]),
    "olmo2": ("all-linear", ["k_proj"]),
}
MATMULS = (
    *("mkldnn._linear_pointwise", "aten.mm", "aten.addmm", "aten.addmm_", "aten.bmm", "aten.baddbmm"),
    *("lowrank_dist.down", "lowrank_dist.expand", "lowrank_dist.grad_a"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("collectives")
    made = {name: make_tiny(family, base / name, **keys) for name, (family, keys) in FAMILIES.items()}
    for family, depth in itertools.product(("llama", "olmo2"), (1, 3)):
        name = f"{family}_{depth}"
        made[name] = make_tiny(family, base / name, num_hidden_layers=depth)
    return {name: str(folder) for name, folder in made.items()}


class CountMatmuls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func.overloadpacket) in MATMULS
        return func(*args, **(kwargs or {}))


def build(folder: str, topology: Any, targets: Any, recompute: bool, fuse_factors: bool = False) -> Any:
    """Return the model with factors on `targets` (all layers that a regular expression names), or frozen where None.

    Frozen means Megatron's own linears, not ours without factors.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from lowrank_dist.arch.placement import LoraRules, place_factors
    from lowrank_dist.methods.lora.factors import inject
    from lowrank_dist.model.load import check_model, load_model
    from lowrank_dist.parallel.masks import MaskSource

    load = partial(
        load_model,
        Path(folder),
        check_model(Path(folder), topology.tp_size, LENGTH),
        topology,
        device=torch.device("cpu"),
        dtype="fp32",
        vocab_multiple=1,
        broadcast=False,
    )
    if targets is None:
        model = load(linears=(ColumnParallelLinear, RowParallelLinear))
    else:
        model = load()
        placements = place_factors(model.architecture, LoraRules(RANK, 8.0, targets, False, {}, {}))
        inject(model, placements, MaskSource(0, 0), 0, topology.tp_rank, topology.tp_size, fuse_factors)
    model.set_recompute(recompute)
    return model


def train_embedding(model: Any) -> None:
    """Let the embedding's output require a gradient, so that the lowest layer behaves like the others."""
    model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())


def loss_of(model: Any) -> Tensor:
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    return model.loss(ids, torch.arange(LENGTH).expand(ROWS, LENGTH), ids.flatten()[::2], ids.flatten()[::2])


def count(model: Any) -> tuple[CollectiveCount, CollectiveCount]:
    """Count the collectives of one microbatch, forward and backward."""
    with count_collectives() as forward:
        loss = loss_of(model)
    with count_collectives() as backward:
        loss.backward()
    return forward, backward


def count_frozen_and_adapted(folders: dict[str, str], sequence: bool, recompute: bool) -> dict[str, Any]:
    """On one rank: return calls [(kind, bytes)] by family and phase, of the frozen model of each choice of targets."""
    topology = ranks.topology(dist.get_world_size(), sequence)
    counts: dict[str, Any] = {}
    for family in FAMILIES:
        for targets, fuse_factors in (
            (None, False),
            *((chosen, False) for chosen in TARGETS[family]),
            ("all-linear", True),
        ):
            model = build(folders[family], topology, targets, recompute, fuse_factors)
            train_embedding(model)
            phases = [[(call.kind, call.bytes) for call in phase.calls] for phase in count(model)]
            counts.setdefault(family, []).append(phases)
    return counts


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("sequence", "recompute"), MODES)
def test_adapted_layers_issue_the_calls_of_frozen_ones(
    folders: dict[str, str], sequence: bool, recompute: bool, world: int
) -> None:
    """The same kinds in the same order, forward and backward; a message is at most wider by its linear's R."""
    for counts in run_ranks(world, count_frozen_and_adapted, folders, sequence, recompute):
        for family, (frozen, *adapted) in counts.items():
            assert all(frozen)
            for targets, phases in zip((*TARGETS[family], "lanes"), adapted, strict=True):
                for calls, expected in zip(phases, frozen, strict=True):
                    assert [kind for kind, _ in calls] == [kind for kind, _ in expected], (family, targets)
                    growth = {found / before - 1 for (_, found), (_, before) in zip(calls, expected, strict=True)}
                    allowed = {parts * RANK / HIDDEN for parts in ((0, 1, 2, 3) if sequence else (0,))}
                    assert growth <= allowed and any(growth) == sequence, (family, targets, growth)


@pytest.mark.parametrize(
    ("family", "sequence", "kinds"),
    [
        ("llama", True, {"all-gather": 2, "reduce-scatter": 2}),
        ("llama", False, {"all-reduce": 2}),
        # One more in each direction for the norms of queries and keys over all heads.
        ("olmo2", True, {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1}),
        ("olmo2", False, {"all-reduce": 3}),
    ],
)
def test_calls_of_a_layer(folders: dict[str, str], family: str, sequence: bool, kinds: dict[str, int]) -> None:
    """The calls of a frozen Megatron layer by kind: the difference of two models that differ by two layers."""
    shallow, deep = folders[f"{family}_1"], folders[f"{family}_3"]
    for phase in run_ranks(2, count_by_depth, shallow, deep, sequence)[0]:
        assert phase == {kind: 2 * calls for kind, calls in kinds.items()}


def count_by_depth(one: str, three: str, sequence: bool) -> list[Counter[str]]:
    """On one rank: return the calls of three adapted layers minus those of one, forward and backward."""
    topology = ranks.topology(2, sequence)
    counts = []
    for folder in (one, three):
        model = build(folder, topology, "all-linear", False)
        train_embedding(model)
        counts.append([phase.calls_by_kind() for phase in count(model)])
    return [deep - shallow for shallow, deep in zip(*counts, strict=True)]


def count_planted(folder: str) -> tuple[list[int], list[int], list[int]]:
    """On one rank: count calls each way, without and with a planted call, and with it also by the profiler."""
    from torch.profiler import profile

    topology = ranks.topology(2, True)
    model = build(folder, topology, "all-linear", False)
    plain = [len(phase.calls) for phase in count(model)]

    def plant(module: Any, args: Any, output: Any) -> None:
        dist.all_reduce(torch.zeros(1), group=topology.tp_group)
        output[0].register_hook(lambda grad: dist.all_reduce(torch.zeros(1), group=topology.tp_group))

    model.decoder.layers[1].mlp.linear_fc1.register_forward_hook(plant)
    planted = [len(phase.calls) for phase in count(model)]
    seen = []
    with profile() as forward:
        loss = loss_of(model)
    with profile() as backward:
        loss.backward()
    for profiled in (forward, backward):
        seen.append(sum(event.count for event in profiled.key_averages() if event.key.startswith("c10d::")))
    return plain, planted, seen


def test_notices_a_planted_call(folders: dict[str, str]) -> None:
    """Negative control, each way: the planted call shows. The profiler, an independent counter, agrees."""
    for plain, planted, profiled in run_ranks(2, count_planted, folders["llama"]):
        assert [more - fewer for more, fewer in zip(planted, plain, strict=True)] == [1, 1]
        assert profiled == planted


def backward_work(
    folder: str, sequence: bool, recompute: bool, targets: str, embedding: bool = False
) -> dict[str, Any]:
    """On one rank: count graph nodes, collectives and matrix products of backward where only `targets` are adapted."""
    topology = ranks.topology(2, sequence)
    model = build(folder, topology, targets, recompute)
    if embedding:
        train_embedding(model)
    loss = loss_of(model)
    nodes, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    with CountMatmuls() as products, count_collectives() as calls:
        loss.backward()
    return {
        "nodes": Counter(node.name() for node in nodes),
        "calls": Counter((call.kind, call.bytes) for call in calls.calls),
        "products": products.count,
    }


def layers(*numbers: int) -> str:
    return rf"model\.layers\.({'|'.join(map(str, numbers))})\..*_proj"


@pytest.mark.parametrize(("sequence", "recompute"), MODES)
def test_nothing_runs_below_the_lowest_adapted_layer(folders: dict[str, str], sequence: bool, recompute: bool) -> None:
    """Where only the last layer is adapted, backward does not depend on how many layers lie below it."""
    alone = run_ranks(2, backward_work, folders["llama_1"], sequence, recompute, layers(0))
    assert alone[0]["products"] > 0 and alone[0]["calls"].total() > 0
    assert run_ranks(2, backward_work, folders["llama_3"], sequence, recompute, layers(2)) == alone
    # Negative control: with a lower layer adapted as well, all three counts grow.
    more = run_ranks(2, backward_work, folders["llama_3"], sequence, recompute, layers(0, 2))
    for found, fewer in zip(more, alone, strict=True):
        assert found["products"] > fewer["products"]
        assert found["calls"].total() > fewer["calls"].total()
        assert found["nodes"].total() > fewer["nodes"].total()


@pytest.mark.parametrize("sequence", [True, False])
def test_lowest_adapted_linear_forms_no_gradient_of_its_input(folders: dict[str, str], sequence: bool) -> None:
    """Two products fewer (dY·W and dU·A); of its message at most the R columns of dU are left."""
    column_bytes = ROWS * LENGTH * 4
    alone, beside = column_bytes * RANK, column_bytes * (HIDDEN + RANK)
    # The dX of fc1, proj and qkv below down_proj is not computed either.
    for name, kind, below in (("q_proj", "reduce-scatter", 0), ("down_proj", "all-gather", 3)):
        target = rf"model\.layers\.0\..*{name}"
        trained = run_ranks(2, backward_work, folders["llama_1"], sequence, False, target)[0]
        whole = run_ranks(2, backward_work, folders["llama_1"], sequence, False, target, True)[0]
        if sequence:
            assert (trained["calls"][kind, alone], trained["calls"][kind, beside]) == (1, 0)
            assert (whole["calls"][kind, alone], whole["calls"][kind, beside]) == (0, 1)
        else:
            assert trained["calls"].total() < whole["calls"].total()
        assert whole["products"] - trained["products"] == 2 + below


def optimiser_calls(folder: str, tensor: int, stage: int, micro_batch: int, per_parameter: bool) -> dict[str, Any]:
    """On one rank: return the tensor-parallel group's calls in one step's microbatches, and in the update."""
    from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser

    setting = Setting(folder, tensor, True, zero_b=False, micro_batch=micro_batch, zero_stage=stage, pad_to=48)
    model, adapted, masks, topology = build_for_training(setting)
    batches, targets = microbatches(setting, topology.dp_rank, topology.dp_size, topology.tp_size)

    def loss(batch: Any) -> Tensor:
        masks.set(0, batch.dropout_rows)
        return model.loss(batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments)

    with count_collectives() as model_alone:
        loss(batches[0]).backward()
    parameters = [p for linear in adapted for p in linear.factors.parameters()]
    for parameter in parameters:
        parameter.grad = None
    rules = OptimiserRules(stage, 0.5, None, 0.01, (0.9, 0.999), 1e-6)
    optimiser = ZeroOptimiser(parameters, topology, rules)
    if per_parameter:
        optimiser._sum_partial = lambda: [
            dist.all_reduce(gradient, group=topology.tp_group)
            for gradient in optimiser.engine.optimizer.averaged_gradients[0]
        ]
    with count_collectives() as accumulated:
        for index, batch in enumerate(batches):
            optimiser.accumulate(lambda batch=batch: loss(batch), 1 / targets, index + 1 == len(batches))
    with count_collectives() as stepped:
        optimiser.step(1e-3)
    replicated = sum(p.numel() for p in parameters if p.tp_partial_grad)
    return {
        "microbatches": len(batches),
        "model": model_alone.within(topology.tp_group).calls_by_kind(),
        "accumulate": accumulated.within(topology.tp_group).calls_by_kind(),
        # Without the scalars of the gradient norm and the overflow flag, which any distributed optimiser exchanges.
        "step": [(c.kind, c.bytes) for c in stepped.within(topology.tp_group).calls if c.bytes > 64],
        "deferred_bytes": 4 * replicated // topology.dp_size,
    }


@pytest.mark.parametrize(("world", "stage"), [(2, 1), (4, 1), (4, 2)])
def test_deferred_reduction_is_one_call_a_step(folders: dict[str, str], world: int, stage: int) -> None:
    """One flat all-reduce of this rank's replicated factors, for any number of layers and microbatches."""
    for micro_batch in (2, 1):
        for found in run_ranks(world, optimiser_calls, folders["llama"], 2, stage, micro_batch, False):
            assert found["microbatches"] == len(LENGTHS) // (world // 2) // micro_batch
            assert found["step"] == [("all-reduce", found["deferred_bytes"])]
            per_microbatch = Counter({kind: calls * found["microbatches"] for kind, calls in found["model"].items()})
            assert found["accumulate"] == per_microbatch


def test_notices_a_reduction_per_parameter(folders: dict[str, str]) -> None:
    """Negative control: one reduction per parameter shows as a call for each of the four linears of both layers."""
    found = run_ranks(2, optimiser_calls, folders["llama"], 2, 1, 2, True)[0]
    assert len(found["step"]) == 2 * 4
