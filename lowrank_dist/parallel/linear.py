"""Megatron's column- and row-parallel linears, carrying low-rank factors that ride the collectives already there.

Without factors both classes are Megatron's own, unmodified. Factors are attached after construction, since Megatron's
layer specs pass a linear neither its name nor its layer.
"""

from __future__ import annotations

from typing import Literal

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lowrank_dist.ops.mask import Mask
from lowrank_dist.parallel.autograd import GatherLinear, LocalLinear, PartialLinear, ReduceExpand
from lowrank_dist.parallel.factors import Lanes, LowRankFactors
from lowrank_dist.parallel.masks import MaskSource


class LowRankLinear:
    """The part that both linears share: factors, where their mask comes from, and no Megatron sharded checkpoint."""

    factors: LowRankFactors | None
    kind: Literal["column", "row"]
    # Megatron's, of the class that this is mixed into.
    weight: nn.Parameter
    tp_group: ProcessGroup
    sequence_parallel: bool
    training: bool

    def attach(self, factors: LowRankFactors, masks: MaskSource, stream: int, lanes: bool = False) -> None:
        """Give this linear its factors. `stream` names its input among all inputs of the model (masks.stream_of).

        lanes: keep the factor beside the weight (parallel/factors.py), where sequence parallelism lets it pay.
        """
        self.factors = factors
        self._masks, self._stream = masks, stream
        pays = lanes and self.sequence_parallel and self.tp_group.size() > 1
        self._lanes = Lanes(self.weight, factors.total_rank, self.kind) if pays else None

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
        self.factors = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.factors is None:
            return super().forward(input_, weight, runtime_gather_output)
        mask = self._mask(0, self.sequence_parallel)
        bias = None if self.skip_bias_add else self.bias
        theta = (self.factors.lora_A, self.factors.lora_B, self.factors)
        if self.sequence_parallel:
            output = GatherLinear.apply(input_, self.weight, bias, *theta, mask, self.tp_group, self._lanes)
        else:
            group = self.tp_group if self.allreduce_dgrad else None
            output = LocalLinear.apply(input_, self.weight, bias, *theta, mask, group)
        return output, self.bias if self.skip_bias_add else None


class LowRankRowParallelLinear(LowRankLinear, RowParallelLinear):
    """W and A sharded over inputs, B replicated. Returns (y, bias if skip_bias_add else None), as Megatron does.

    Input [s, b, K / N], output [s, b, O] ([s / N, b, O] under sequence parallelism).
    """

    kind = "row"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.factors = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.factors is None:
            return super().forward(input_)
        factors = self.factors
        mask = self._mask(self.tp_group.rank() * self.input_size_per_partition, tokens_sharded=False)
        if self.sequence_parallel and self.tp_group.size() > 1:
            partial = PartialLinear.apply(input_, self.weight, factors.lora_A, factors, mask, self._lanes)
            output = ReduceExpand.apply(partial, factors.lora_B, factors, self.tp_group, input_.requires_grad)
        else:
            # U·bᵀ is added before the reduction that sums X·Wᵀ anyway, so B's gradient is partial over ranks.
            theta = (factors.lora_A, factors.lora_B, factors)
            output = LocalLinear.apply(input_, self.weight, None, *theta, mask, None)
            output = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias if self.skip_bias_add else None
        return output + self.bias, None
