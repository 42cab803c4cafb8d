"""Megatron's column- and row-parallel linears with low-rank updates, which travel in the existing collectives.

With Megatron's own weight and no update, both classes behave exactly as Megatron's. An update, or another kind of
frozen weight, is attached after construction, because Megatron's layer specs pass a linear neither its name nor its
layer.
"""

from __future__ import annotations

from typing import Literal

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lowrank_dist.ops.mask import Mask
from lowrank_dist.parallel.autograd import GatherLinear, LocalLinear, PartialLinear, ReduceExpand
from lowrank_dist.parallel.collectives import enter_parallel_region, leave_parallel_region
from lowrank_dist.parallel.frozen import Dense, FrozenLinear, FrozenWeight, FusedBuffer
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.update import LowRankUpdate


class LowRankLinear:
    """The part that both linears share: the frozen weight, its update and the source of the update's dropout masks.

    frozen: the stored weight; None where Megatron's own forward runs. update: None for a linear that is only frozen.
    """

    frozen: FrozenWeight | None
    update: LowRankUpdate | None
    kind: Literal["column", "row"]
    # Attributes of the Megatron class that this is mixed into.
    weight: nn.Parameter
    bias: nn.Parameter | None
    skip_bias_add: bool
    tp_group: ProcessGroup
    sequence_parallel: bool
    training: bool

    def hold(self, frozen: FrozenWeight) -> None:
        """Use `frozen` instead of Megatron's parameter."""
        self.frozen = frozen

    def attach(self, update: LowRankUpdate, masks: MaskSource, stream: int, fuse_factors: bool = False) -> None:
        """Attach an update. `stream` identifies this linear's input among all inputs of the model (masks.stream_of).

        fuse_factors: store the factor beside a dense weight (parallel/frozen.py); ignored without sequence parallelism.
        """
        self.update = update
        self._masks, self._stream = masks, stream
        if self.frozen is None or isinstance(self.frozen, Dense):
            pays = fuse_factors and self.sequence_parallel and self.tp_group.size() > 1
            self.frozen = FusedBuffer(self.weight, update.total_rank, self.kind) if pays else Dense(self.weight)

    def _mask(self, feature_offset: int, tokens_sharded: bool) -> Mask | None:
        if not self.training:
            return None
        shard = (self.tp_group.rank(), self.tp_group.size()) if tokens_sharded else None
        return self._masks.mask(self._stream, feature_offset, shard)

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict[str, object]:
        # Megatron would mark the sharded factor as a replica and write one rank's share as the whole.
        raise AssertionError(
            "factors are saved whole, by lowrank_dist.checkpoint, not through Megatron's sharded state"
        )


class LowRankColumnParallelLinear(LowRankLinear, ColumnParallelLinear):
    """W and B sharded over outputs, A replicated. Returns (y, bias if skip_bias_add else None), as Megatron does.

    Input [s, b, K] ([s / N, b, K] under sequence parallelism), output [s, b, O / N].
    """

    kind = "column"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = self.update = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.frozen is None:
            return super().forward(input_, weight, runtime_gather_output)
        update, bias = self.update, None if self.skip_bias_add else self.bias
        if update is None:
            gathered = enter_parallel_region(input_, self.tp_group, sequence_parallel=self.sequence_parallel)
            return FrozenLinear.apply(gathered, self.frozen, bias), self.bias if self.skip_bias_add else None
        mask = self._mask(0, self.sequence_parallel)
        parameters = (*update.down_parameters, *update.up_parameters)
        inner_bias = None if update.rescales else bias
        if self.sequence_parallel:
            output = GatherLinear.apply(input_, self.frozen, inner_bias, update, mask, self.tp_group, *parameters)
        else:
            group = self.tp_group if self.allreduce_dgrad else None
            output = LocalLinear.apply(input_, self.frozen, inner_bias, update, mask, group, *parameters)
        if update.rescales:
            output = update.rescaled(output, bias, outside_graph=False)
        return output, self.bias if self.skip_bias_add else None


class LowRankRowParallelLinear(LowRankLinear, RowParallelLinear):
    """W and A sharded over inputs, B replicated. Returns (y, bias if skip_bias_add else None), as Megatron does.

    Input [s, b, K / N], output [s, b, O] ([s / N, b, O] under sequence parallelism).
    """

    kind = "row"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = self.update = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.frozen is None:
            return super().forward(input_)
        if self.update is None:
            output = FrozenLinear.apply(input_, self.frozen, None)
            output = leave_parallel_region(output, self.tp_group, sequence_parallel=self.sequence_parallel)
        else:
            output = self._adapted(input_, self.frozen, self.update)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias if self.skip_bias_add else None
        return output + self.bias, None

    def _adapted(self, x: Tensor, frozen: FrozenWeight, update: LowRankUpdate) -> Tensor:
        mask = self._mask(self.tp_group.rank() * self.input_size_per_partition, tokens_sharded=False)
        downs, ups = update.down_parameters, update.up_parameters
        if self.sequence_parallel and self.tp_group.size() > 1:
            partial = PartialLinear.apply(x, frozen, update, mask, *downs)
            output = ReduceExpand.apply(partial, update, self.tp_group, x.requires_grad, *ups)
            return update.rescaled(output, None, outside_graph=True) if update.rescales else output
        # U·bᵀ is added before the reduction that sums X·Wᵀ anyway, so B's gradient is partial over ranks.
        output = LocalLinear.apply(x, frozen, None, update, mask, None, *downs, *ups)
        if update.rescales:
            output = update.rescaled(output, None, outside_graph=False)
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
