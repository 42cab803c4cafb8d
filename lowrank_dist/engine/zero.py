"""DeepSpeed ZeRO for the optimiser state of Θ, and of nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank_dist.backend.apex import adamw
from lowrank_dist.errors import UserError
from lowrank_dist.parallel.topology import DeepSpeedMpu, Topology

# Index of the replicated factors' parameter group; the sharded ones are group 1.
REPLICATED = 0


@dataclass(frozen=True)
class OptimiserRules:
    """What ZeRO and AdamW need of the configuration (sections `engine` and `train`)."""

    zero_stage: int
    clip: float | None
    reduce_bucket: int | None
    weight_decay: float
    betas: tuple[float, float]
    eps: float


class _Theta(nn.Module):
    """The module that DeepSpeed sees: Θ alone. Φ₀ is invisible to it, so it can neither broadcast, cast nor bucket it.

    Its forward runs whatever closure it is given, which lets the engine's own hooks and counters work as usual.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.theta = nn.ParameterList(parameters)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


class ZeroOptimiser:
    """Accumulates gradients of Θ over microbatches and steps AdamW with its state partitioned over data parallelism.

    Replicated and sharded factors are two parameter groups. Within the replicated group every tensor-parallel rank
    has the same partition of the same parameters, so the deferred sum over tensor parallelism is one flat fp32
    all-reduce of 1/DP of the group, after ZeRO's own reduction and before norm, clipping and update; it is the same
    code at stages 1 and 2.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], topology: Topology, rules: OptimiserRules) -> None:
        import deepspeed  # chooses its accelerator when imported: only after backend.select_backend has spoken
        from deepspeed.ops import __compatible_ops__
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        # On CPU init_distributed compiles this for half a minute; only inference uses it.
        __compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._topology = topology
        groups = [
            {"params": [p for p in parameters if p.tp_partial_grad], "weight_decay": rules.weight_decay},
            {"params": [p for p in parameters if not p.tp_partial_grad], "weight_decay": rules.weight_decay},
        ]
        optimiser = adamw(parameters[0].device.type)(groups, lr=0.0, betas=rules.betas, eps=rules.eps)
        self.engine, *_ = deepspeed.initialize(
            model=_Theta(parameters),
            optimizer=optimiser,
            mpu=DeepSpeedMpu(topology),
            config=self._config(parameters, rules),
            dist_init_required=False,
        )
        if type(self.engine.optimizer) is not DeepSpeedZeroOptimizer:
            raise UserError(
                f"this DeepSpeed chose {type(self.engine.optimizer).__name__} where ZeRO stage {rules.zero_stage} was "
                "asked for; it would drop the deferred gradient sum. Install a DeepSpeed of the range in setup.py"
            )

    @staticmethod
    def _config(parameters: Sequence[nn.Parameter], rules: OptimiserRules) -> dict[str, Any]:
        bucket = rules.reduce_bucket or sum(p.numel() for p in parameters)
        return {
            # One "step" of DeepSpeed is one microbatch: boundaries are announced explicitly, their number may vary.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": rules.clip or 0.0,
            "zero_optimization": {
                "stage": rules.zero_stage,
                "overlap_comm": False,
                # DeepSpeed allocates this many elements in every backward, whatever |Θ| is (its default is 5e8).
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
            },
            # Θ is fp32 with fp32 gradients. DeepSpeed's bf16 would accumulate in bf16 or lose the deferred sum (FACTS).
            "bf16": {"enabled": False},
            "steps_per_print": None,
        }

    def accumulate(self, compute: Callable[[], Tensor], scale: float, last: bool) -> Tensor:
        """Forward and backward of one microbatch; `compute` returns its summed loss. Returns that sum, detached.

        scale is 1 / (target tokens of the global batch): ZeRO averages over data parallelism, which is undone here.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(compute)
        self.engine.backward(loss * (scale * self._topology.dp_size))
        if not last:
            # Only DeepSpeed's counters move: the update happens at the boundary.
            self.engine.step()
        return loss.detach()

    def step(self, lr: float) -> float:
        """Deferred sum, clipping, AdamW. Returns the gradient norm before clipping; inf where a gradient overflowed."""
        self._sum_replicated()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if self.engine.optimizer.overflow:
            return float("inf")
        return float(self.engine.get_global_grad_norm())

    def _sum_replicated(self) -> None:
        if self._topology.tp_size == 1:
            return
        gradients = self.engine.optimizer.averaged_gradients[REPLICATED]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=self._topology.tp_group)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, pieces, strict=True):
            gradient.copy_(summed.view_as(gradient))
