"""The plan of a run as plain data: what the report prints and `plan --json` writes.

Sizes are in bytes and times in seconds, unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Setting:
    """A value that the plan assumes of the run.

    name: the key of the config, or the option of the command. source: who set it; "plan" where the plan chose it.
    """

    name: str
    value: str | int | float
    source: Literal["given", "default", "plan"]


@dataclass(frozen=True)
class Workload:
    """An optimizer step: samples, tokens per sample, and the share of the tokens that is trained on (0 to 1).

    Every sample is taken to be `length` tokens long. settings: the values that decide workload, method and layout.
    """

    global_batch: int
    length: int
    target_share: float
    packing: bool
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class ModelSize:
    """The frozen base. dtype: the type that it runs in. parameters_by_part: name of the part → parameters."""

    name: str
    family: str
    layers: int
    hidden: int
    dtype: str
    parameters: int
    parameters_by_part: dict[str, int]


@dataclass(frozen=True)
class Share:
    """A number of trained parameters, and its percentage of the base's parameters."""

    parameters: int
    percent: float


@dataclass(frozen=True)
class Trained:
    """The trained parameters. stored: elements of the adapter. all_of_base: the base itself is trained."""

    method: str
    parameters: int
    stored: int
    percent: float
    all_of_base: bool
    by_module: dict[str, Share]


@dataclass(frozen=True)
class Files:
    """Sizes of files, and host memory of a node.

    adapter: the adapter in fp32, or the trained model. checkpoint: the adapter, fp32 weights and two Adam moments.
    disk: the base, the checkpoints kept at a time and one that is being written, and the adapter. kept: number of
    checkpoints that stay; None for all, in which case `disk` counts one. host_memory_saving: taken by rank 0 in
    addition.
    """

    adapter: int
    adapter_16_bit: int
    checkpoint: int
    base: int
    disk: int
    kept: int | None
    host_memory_loading: int
    host_memory_saving: int


@dataclass(frozen=True)
class Machines:
    """The nodes of the plan. memory: bytes of a GPU. usable: the part of `memory` that tensors can use.

    form, sold_as: of the GPU, as `hardware.Gpu` has them. other_forms: the names of the other forms of its model.
    """

    nodes: int
    gpus_per_node: int
    gpu: str
    memory: int
    usable: int
    form: str
    sold_as: int
    other_forms: tuple[str, ...]


@dataclass(frozen=True)
class PlannedLayout:
    """One layout. microbatches: of a rank in a step. short: bytes by which a GPU is too small. spare: bytes left.

    seconds: modelled time of a step; None on CPUs. crosses_nodes: a tensor-parallel group lies on several nodes.
    """

    tensor: int
    data: int
    sequence: bool
    micro_batch: int
    recompute: bool
    microbatches: int
    memory: int
    short: int
    spare: int
    crosses_nodes: bool
    seconds: float | None

    def __str__(self) -> str:
        words = [f"TP {self.tensor}{' across nodes' if self.crosses_nodes else ''}", f"DP {self.data}"]
        words += [f"microbatch {self.micro_batch}", *["sequence parallel"] * self.sequence]
        return ", ".join(words + ["recompute"] * self.recompute)


@dataclass(frozen=True)
class Change:
    """A change with which the run fits. words: what to add to the command. layout: the layout after the change."""

    words: str
    layout: PlannedLayout


@dataclass(frozen=True)
class MemoryOfGpu:
    """Bytes on a GPU by part at the fullest moment, named `moment`, and the total of every moment."""

    total: int
    moment: str
    parts: dict[str, int]
    moments: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a GPU in the planned layout, without and with recomputation of activations."""

    without_recompute: MemoryOfGpu
    with_recompute: MemoryOfGpu


@dataclass(frozen=True)
class Collectives:
    """The collectives of one kind over one group ("tensor" or "data") that a rank issues in an optimizer step.

    bytes: of the whole messages of the step.
    """

    kind: str
    group: str
    calls_per_microbatch: int
    calls: int
    bytes: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of an optimizer step over all GPUs. model: without repeated work. attention: its part of `executed`."""

    executed: int
    model: int
    attention: int
    per_gpu: int


@dataclass(frozen=True)
class TimePlan:
    """The modelled time of an optimizer step by term. bound: the largest term. mfu: model FLOPs utilisation, 0 to 1."""

    modelled: bool
    seconds: float
    terms: dict[str, float]
    bound: str
    mfu: float
    tokens_per_second: float


@dataclass(frozen=True)
class TensorSizes:
    """Tensor-parallel sizes that are possible on these nodes, and those that are not, each with its reason."""

    legal: tuple[int, ...]
    illegal: dict[int, str]


@dataclass(frozen=True)
class State:
    """Bytes of weights, gradients and optimizer state of one replica: of the planned method, and of full training."""

    planned: int
    planned_bytes_per_parameter: float
    full: int
    full_bytes_per_parameter: float


@dataclass(frozen=True)
class MethodPlan:
    """One method on the layout of the plan.

    placement: how its parameters lie on the ranks. trained: elements while training. stored: elements in the adapter.
    percent: `trained` relative to the base's parameters. added: collectives per layer, forward and backward, beyond
    those of a frozen layer that passes a gradient down. flops: executed in a step by all GPUs. seconds: modelled; None
    on CPUs.
    """

    method: str
    placement: str
    trained: int
    stored: int
    memory: int
    fits: bool
    added: int
    flops: int
    seconds: float | None
    percent: float


@dataclass(frozen=True)
class Compared:
    """A value by formula and by execution. difference: formula / executed − 1."""

    formula: float
    executed: float
    difference: float


@dataclass(frozen=True)
class ComparedCalls:
    """Collectives by kind → calls and bytes, by formula and by execution."""

    formula: dict[str, dict[str, int]]
    executed: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Verification:
    """A step executed on fake tensors, beside the formulas.

    memory: bytes by part, the peak, and the FLOPs of a microbatch. messages: of a microbatch and of the step's end.
    from_plan: the differences between the plan's memory and the formula of the executed peak, in order, as (reason,
    bytes).
    """

    agrees: bool
    tensor_rank: int
    memory: dict[str, Compared]
    messages: dict[str, ComparedCalls]
    from_plan: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Plan:
    """The plan of a run on some nodes.

    fits: `layout` fits. tight: it fits, but what remains is less than the error that a plan may have (`accuracy`,
    relative to the memory). remedies: changes with which it fits, or is not tight any more. runner_up: the fastest
    layout of another kind. recommended: the plan's own choice, where the user has fixed another layout. auto_tensor:
    the tensor-parallel size that parallel.tensor=auto stands for, if the run has it.
    """

    model: ModelSize
    workload: Workload
    trained: Trained
    files: Files
    cluster: Machines
    layout: PlannedLayout
    fits: bool
    tight: bool
    accuracy: float
    remedies: tuple[Change, ...]
    runner_up: PlannedLayout | None
    recommended: PlannedLayout | None
    memory: MemoryPlan
    messages: tuple[Collectives, ...]
    flops: Flops
    time: TimePlan | None
    tensor_sizes: TensorSizes
    state: State
    methods: tuple[MethodPlan, ...]
    auto_tensor: int | None = None
    verification: Verification | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as values that `json.dumps` takes."""
        return asdict(self)
