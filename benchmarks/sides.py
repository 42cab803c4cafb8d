"""The linears of one transformer layer as the sides of benchmarks/overhead.py: ours, PEFT, plain torch, and frozen.

Legend: N ranks, of which this process is rank 0 and the others are not there (a fake process group copies in place of
communicating); T tokens, T_j = T / N this rank's token shard, K inputs and O outputs of the rank's weight, R = Σ r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from rivals import EagerLinear, FrozenColumn, FrozenRow
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import parse_architecture
from lowrank_dist.arch.placement import LoraRules, place_factors
from lowrank_dist.arch.rows import LinearLayout, Part
from lowrank_dist.methods.lora.factors import AdaptedLinear, inject
from lowrank_dist.ops.mask import quantise
from lowrank_dist.parallel.collectives import gather_rows, reduce_scatter_rows
from lowrank_dist.parallel.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.topology import Topology

# hidden, ffn, heads, KV heads.
SHAPES = {
    "tiny": (64, 176, 8, 8),
    "tinyllama": (2048, 5632, 32, 4),
    "llama-3-8b": (4096, 14336, 32, 8),
    "llama-3-70b": (8192, 28672, 64, 8),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# s = alpha / r of every factor, and the spread of B: with both the update is a good part of Y, so its errors show.
SCALE, B_SPREAD = 2.0, 0.1
WORLD = 8


def architecture(shape: str) -> Architecture:
    hidden, ffn, heads, kv_heads = SHAPES[shape]
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32_000,
    }
    return parse_architecture(config, shape)


def join_fake_world() -> dict[str, bool]:
    """Be rank 0 of `WORLD` fake ranks; return whether each collective copies as it should, which torch decides."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    group = dist.group.WORLD
    ones = torch.ones(WORLD, 1)
    gathered, work = gather_rows(ones[:1], group)
    work.wait()
    return {"gather_copies": bool((gathered == 1).all()), "reduce_scatter_copies": _scatters(group)}


def _scatters(group: ProcessGroup) -> bool:
    shard, work = reduce_scatter_rows(torch.arange(1.0, WORLD + 1)[:, None], group)
    work.wait()
    return bool((shard == 1).all())


@dataclass(frozen=True)
class Side:
    """One side. `forward` maps `inputs`, leaves that require a gradient, to outputs whose gradients are `grads`.

    twin: the side without factors that this one is timed against; for a frozen side its own name. parameters: the
    trained tensors, (A, B) after (A, B) in the order of the projections. modules: switched between train and eval, i.e.
    with and without dropout.
    """

    name: str
    twin: str
    forward: Callable[[Sequence[Tensor]], list[Tensor]]
    inputs: list[Tensor]
    grads: list[Tensor]
    parameters: list[Tensor]
    modules: list[nn.Module]

    def step(self) -> tuple[Tensor, ...]:
        """Run forward and backward: dX of every input, then the gradient of every parameter.

        torch.autograd.grad returns the gradients unaccumulated; the caller drops them outside its clock.
        """
        return torch.autograd.grad(self.forward(self.inputs), [*self.inputs, *self.parameters], self.grads)

    def train(self, mode: bool) -> None:
        for module in self.modules:
            module.train(mode)


class Layer:
    """Frozen weights, inputs and output gradients of one rank's share of a layer, and the sides made from them.

    Weights are random and fused as Megatron has them; a projection's own weight is cut out of them. Inputs are
    [T, 1, K] ([T_j, 1, K] before a column-parallel linear under sequence parallelism), the same storage for all sides.
    """

    def __init__(self, shape: str, tokens: int, dtype: torch.dtype, device: torch.device, topology: Topology) -> None:
        self.architecture, self.topology, self.device, self.dtype = architecture(shape), topology, device, dtype
        self.tokens, self.n = tokens, topology.tp_size
        self.layouts = list(self.architecture.layers[0].linears.values())
        torch.manual_seed(0)
        shapes = [layout.local_shape(self.n) for layout in self.layouts]
        self.weights = [torch.randn(o, k, device=device, dtype=dtype).mul_(k**-0.5) for o, k in shapes]
        self.inputs = [
            self._tokens(k, layout.kind == "column") for (_, k), layout in zip(shapes, self.layouts, strict=True)
        ]
        self.grads = [
            self._tokens(o, layout.kind == "row") for (o, _), layout in zip(shapes, self.layouts, strict=True)
        ]
        self.rows = torch.arange(tokens, device=device)[:, None]

    def _tokens(self, width: int, sharded: bool) -> Tensor:
        rows = self.tokens // self.n if sharded else self.tokens
        return torch.randn(rows, 1, width, device=self.device, dtype=self.dtype)

    def leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self.inputs]

    def cut(self, fused: Tensor, layout: LinearLayout, dim: int) -> list[Tensor]:
        """Return a fused tensor's projections, each contiguous: its rows of this rank along `dim`."""
        segments = layout.segments(self.topology.tp_rank, self.n)
        pieces: list[list[Tensor]] = [[] for _ in layout.parts]
        for segment in segments:
            pieces[segment.part].append(fused.narrow(dim, segment.local_start, segment.length))
        return [torch.cat(part, dim) for part in pieces]

    def frozen(self) -> Side:
        """Return the frozen linears by the same GEMMs as ours, with the collectives of any tensor-parallel layer."""
        group = self.topology.tp_group if self.n > 1 else None
        functions = [{"column": FrozenColumn, "row": FrozenRow}[layout.kind] for layout in self.layouts]

        def forward(inputs: Sequence[Tensor]) -> list[Tensor]:
            parts = zip(functions, inputs, self.weights, strict=True)
            return [function.apply(x, weight, group) for function, x, weight in parts]

        return Side("frozen", "frozen", forward, self.leaves(), self.grads, [], [])

    def ours(self, r: int, p: float, fuse_factors: bool = False) -> tuple[Side, list[AdaptedLinear]]:
        """Return the project's own parallel linears with its own placement and injection."""
        skeleton = nn.Module()
        for layout, weight in zip(self.layouts, self.weights, strict=True):
            self._put(skeleton, layout.module_of(0), self._megatron_linear(layout, weight, fuse_factors))
        masks = MaskSource(0, quantise(p))
        masks.set(0, self.rows)
        placements = place_factors(self.architecture, LoraRules(r, SCALE * r, "all-linear", False, {}, {}))
        adapted = inject(skeleton, placements, masks, 0, self.topology.tp_rank, self.n, fuse_factors)
        torch.manual_seed(1)
        for x in adapted:
            x.factors.lora_B.data.normal_(std=B_SPREAD)
        linears = [skeleton.get_submodule(layout.module_of(0)) for layout in self.layouts]

        def forward(inputs: Sequence[Tensor]) -> list[Tensor]:
            return [module(x)[0] for module, x in zip(linears, inputs, strict=True)]

        parameters = [parameter for x in adapted for parameter in (x.factors.lora_A, x.factors.lora_B)]
        name = "ours_lanes" if fuse_factors else "ours"
        return Side(name, "frozen", forward, self.leaves(), self.grads, parameters, [skeleton]), list(adapted)

    def _put(self, root: nn.Module, path: str, module: nn.Module) -> None:
        *above, leaf = path.split(".")
        for name in above:
            if not hasattr(root, name):
                root.add_module(name, nn.Module())
            root = getattr(root, name)
        root.add_module(leaf, module)

    def _megatron_linear(self, layout: LinearLayout, weight: Tensor, fuse_factors: bool) -> nn.Module:
        from megatron.core.model_parallel_config import ModelParallelConfig

        config = ModelParallelConfig(
            tensor_model_parallel_size=self.n,
            sequence_parallel=self.topology.sequence_parallel,
            use_cpu_initialization=self.device.type == "cpu",
            perform_initialization=False,
            params_dtype=self.dtype,
        )
        kind = {"column": LowRankColumnParallelLinear, "row": LowRankRowParallelLinear}[layout.kind]
        module = kind(
            layout.in_features,
            layout.out_features,
            config=config,
            init_method=lambda weight: weight,
            bias=False,
            skip_bias_add=False,
            tp_group=self.topology.tp_group,
            **({"input_is_parallel": True} if layout.kind == "row" else {}),
        ).requires_grad_(False)
        # FusedBuffer moves the weight into a buffer of its own; everything else shares one copy.
        module.weight.data = weight.clone() if fuse_factors else weight
        return module

    def peft(self, adapted: Sequence[AdaptedLinear], r: int, p: float, same_dtype: bool = False) -> tuple[Side, Side]:
        """Return (PEFT's layers on nn.Linear, the same nn.Linear without them), given our factors.

        Every input has all T tokens (a shard's repeated N times), [1, T, K]: PEFT has no token shards. Adapters are
        fp32 under a bf16 base, which is PEFT's default, or with `same_dtype` in the base's dtype.
        """
        root, names = nn.Module(), []
        for part, own in self._projection_weights:
            plain = nn.Linear(own.size(1), own.size(0), bias=False, device="meta")
            plain.weight = nn.Parameter(own, requires_grad=False)
            root.add_module(part.name, plain)
            names.append(part.name)
        bare = [getattr(root, name) for name in names]
        config = LoraConfig(r=r, lora_alpha=SCALE * r, lora_dropout=p, target_modules=names, bias="none")
        get_peft_model(root, config, autocast_adapter_dtype=not same_dtype)
        wrapped = [getattr(root, name) for name in names]
        parameters = [w.weight for x in wrapped for w in (x.lora_A["default"], x.lora_B["default"])]
        expected = self.dtype if same_dtype else torch.float32
        assert {w.dtype for w in parameters} == {expected}, "PEFT keeps its adapters in another dtype than it did"
        values = [
            t for x in adapted for i in range(len(x.factors.shards)) for t in (x.factors.a_of(i), x.factors.b_of(i))
        ]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
        name = "peft_same_dtype" if same_dtype else "peft"
        return self._projections(name, wrapped, parameters, [root]), self._projections("frozen_peft", bare, [], [])

    def _projections(
        self, name: str, modules: list[nn.Module], parameters: list[Tensor], roots: list[nn.Module]
    ) -> Side:
        parts = [i for i, layout in enumerate(self.layouts) for _ in layout.parts]

        def forward(inputs: Sequence[Tensor]) -> list[Tensor]:
            return [module(inputs[i]) for module, i in zip(modules, parts, strict=True)]

        inputs, grads = self._whole
        leaves = [x.detach().requires_grad_() for x in inputs]
        return Side(name, "frozen_peft", forward, leaves, grads, parameters, roots)

    @cached_property
    def _projection_weights(self) -> list[tuple[Part, Tensor]]:
        pairs = zip(self.layouts, self.weights, strict=True)
        return [x for layout, w in pairs for x in zip(layout.parts, self.cut(w, layout, 0), strict=True)]

    @cached_property
    def _whole(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return inputs [1, T, K] and output gradients [1, T, rows of a projection], a shard's tokens repeated."""
        inputs, grads = (
            [x.repeat(self.tokens // x.size(0), 1, 1).view(1, self.tokens, -1) for x in tensors]
            for tensors in (self.inputs, self.grads)
        )
        return inputs, [x for grad, layout in zip(grads, self.layouts, strict=True) for x in self.cut(grad, layout, -1)]

    def eager(self, adapted: Sequence[AdaptedLinear], p: float) -> Side:
        """Return plain torch's fastest form: fused weights, hand-written autograd, beta = 1, X̃ and mask saved.

        N = 1 only.
        """
        thetas = [(x.factors.scaled_a(self.dtype, None), x.factors.dense_bt(self.dtype).contiguous()) for x in adapted]
        parameters = [theta.requires_grad_() for pair in thetas for theta in pair]
        dropout = nn.Dropout(p)

        def forward(inputs: Sequence[Tensor]) -> list[Tensor]:
            p_now = dropout.p if dropout.training else 0.0
            layers = zip(inputs, self.weights, thetas, strict=True)
            return [EagerLinear.apply(x, weight, a, bt, p_now) for x, weight, (a, bt) in layers]

        return Side("eager", "frozen", forward, self.leaves(), self.grads, parameters, [dropout])

    def sides(self, r: int, p: float) -> list[Side]:
        """Return every side of one setting, ready to train; all have the same factors."""
        ours, adapted = self.ours(r, p)
        peft, frozen_peft = self.peft(adapted, r, p)
        sides = [self.frozen(), ours, frozen_peft, peft]
        if self.dtype != torch.float32:
            sides.append(self.peft(adapted, r, p, same_dtype=True)[0])
        if self.n > 1:
            sides.append(self.ours(r, p, fuse_factors=True)[0])
        elif self.device.type == "cuda":
            sides.append(self.eager(adapted, p))
        for side in sides:
            side.train(True)
        return sides
