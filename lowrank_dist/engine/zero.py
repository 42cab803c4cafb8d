"""DeepSpeed ZeRO for the optimiser state of Θ alone, and the engine that runs model and optimiser in a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lowrank_dist.backend.apex import adamw
from lowrank_dist.data.batches import Microbatch, StepBatch
from lowrank_dist.errors import UserError
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.theta import Theta, is_partial
from lowrank_dist.parallel.topology import DeepSpeedMpu, Topology

# DeepSpeed's default size of its two buckets, in elements: our upper limit. It allocates them in every backward.
_LARGEST_BUCKET = 5 * 10**8
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimiserRules:
    """Settings of ZeRO and AdamW, from the configuration (sections `engine` and `train`)."""

    zero_stage: int
    clip: float | None
    reduce_bucket: int | None
    weight_decay: float
    betas: tuple[float, float]
    eps: float


class _Theta(nn.Module):
    """The module that DeepSpeed sees: Θ alone. Φ₀ is not in it, so DeepSpeed cannot broadcast, cast or bucket Φ₀.

    Its forward calls the given closure, so that hooks and counters of DeepSpeed's engine work as usual.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.theta = nn.ParameterList(parameters)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


class ZeroOptimiser:
    """Accumulates gradients of Θ over microbatches and steps AdamW with its state partitioned over data parallelism.

    Parameters with partial gradients form a group of their own (`parallel.theta.mark`). In it every tensor-parallel
    rank has the same partition of the same parameters. The deferred sum over tensor parallelism is therefore one flat
    fp32 all-reduce of 1/DP of the group. It runs after ZeRO's own reduction and before norm, clipping and update, with
    the same code at stages 1 and 2.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        topology: Topology,
        rules: OptimiserRules,
        enter: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """enter: called with each phase that begins ("forward", "backward", "reduction", "optimiser")."""
        import deepspeed  # chooses its accelerator when imported, so backend.select_backend must run first
        from deepspeed.ops import __compatible_ops__
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        # On CPU init_distributed compiles this for half a minute; only inference uses it.
        __compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._topology, self._parameters, self._enter = topology, tuple(parameters), enter
        # DeepSpeed cannot flatten an empty group. The partial one comes first.
        parts = [[p for p in parameters if is_partial(p)], [p for p in parameters if not is_partial(p)]]
        self._partial = bool(parts[0])
        groups = [{"params": part, "weight_decay": rules.weight_decay} for part in parts if part]
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
                f"this DeepSpeed chose {type(self.engine.optimizer).__name__} for ZeRO stage {rules.zero_stage}, "
                "which would drop the deferred gradient sum; install a DeepSpeed version within the range in "
                "setup.py"
            )
        # As in DeepSpeed's pipeline engine: gradients are reduced by a separate call, not in backward.
        self.engine.enable_backward_allreduce = False
        self._make_moments()

    @staticmethod
    def _config(parameters: Sequence[nn.Parameter], rules: OptimiserRules) -> dict[str, Any]:
        bucket = rules.reduce_bucket or min(_LARGEST_BUCKET, sum(p.numel() for p in parameters))
        return {
            # A "step" of DeepSpeed is one microbatch. Boundaries are set explicitly, since their distance may vary.
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
            # Θ is fp32 with fp32 gradients. DeepSpeed's bf16 would accumulate in bf16 or lose the deferred sum.
            "bf16": {"enabled": False},
            "steps_per_print": None,
        }

    def accumulate(self, compute: Callable[[], Tensor], scale: float, last: bool) -> Tensor:
        """Run forward and backward of one microbatch and return its summed loss, detached.

        compute: returns the summed loss. scale: 1 / (target tokens of the global batch); ZeRO averages over data
        parallelism, which is undone here. last: this is the last microbatch of the step.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self._enter("forward")
        loss = self.engine(compute)
        self._enter("backward")
        self.engine.backward(loss * (scale * self._topology.dp_size))
        self._enter("reduction")
        self.engine.allreduce_gradients()
        if not last:
            # Only DeepSpeed's counters move: the update happens at the boundary.
            self.engine.step()
        return loss.detach()

    def step(self, lr: float, *, poison: bool = False) -> float:
        """Run the deferred sum, clipping and AdamW. Returns the gradient norm before clipping.

        Returns inf where a gradient was not finite or a rank asked to `poison` the gradients; then no rank has changed
        anything. Ranks agree through DeepSpeed's own overflow check, without another message.
        """
        self._sum_partial()
        self._enter("optimiser")
        if poison:
            self._poison_gradients()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if self.engine.optimizer.overflow:
            return float("inf")
        return float(self.engine.get_global_grad_norm())

    def fragments(self) -> list[tuple[int, int]]:
        """Return (first element, number of elements) of each parameter's part in this rank's partition, or (0, 0).

        DeepSpeed's safe_get_full_* would sum these over data parallelism, by one full-size all-reduce for each
        parameter and kind. A checkpoint needs them only once, on one rank.
        """
        return [
            (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
            for mapping in map(_mapping, self._parameters)
        ]

    def snapshot(self) -> Tensor:
        """Return a copy, [3, elements] fp32 on the CPU: masters, exp_avg and exp_avg_sq of all `fragments` in order."""
        held = [mapping for mapping in map(_mapping, self._parameters) if mapping is not None]
        if not held:  # a very small Θ over many ranks
            return torch.zeros(1 + len(_MOMENTS), 0)
        rows = [
            torch.cat([mapping.get_hp_fragment(key).detach().flatten() for mapping in held]).cpu()
            for key in (None, *_MOMENTS)
        ]
        return torch.stack(rows)

    def gradients(self) -> Tensor:
        """Return a copy, [elements] fp32 on the CPU: the gradient of the step, of all `fragments` in order.

        It is complete, and not clipped yet, when the phase "optimiser" begins; `step` frees it.
        """
        flat: dict[int, Tensor] = {}
        pieces = []
        for mapping in map(_mapping, self._parameters):
            if mapping is None:
                continue
            group, address = mapping.param_group_index, mapping.hp_fragment_address
            if group not in flat:
                flat[group] = torch.cat([part.reshape(-1) for part in self.engine.optimizer.averaged_gradients[group]])
            pieces.append(flat[group].narrow(0, address.start, address.numel))
        return torch.cat(pieces).float().cpu() if pieces else torch.zeros(0)

    def restore(self, number: int, values: Tensor) -> None:
        """Set master and moments [3, *shape] of one parameter. Collective over data parallelism.

        Call `restored` after the last parameter.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self._parameters[number]
        safe_set_full_fp32_param(parameter, values[0])
        for key, moment in zip(_MOMENTS, values[1:], strict=True):
            safe_set_full_optimizer_state(parameter, moment, key)

    def restored(self, updates: int) -> None:
        """Finish a restore: copy the masters into the parameters and set AdamW's step count. Collective.

        updates: optimizer steps so far, without skipped ones.
        """
        self._count_from(updates)
        self.engine.optimizer.update_lp_params()

    def _make_moments(self) -> None:
        """Create AdamW's state now, by a step with gradient 0 and learning rate 0, which changes nothing.

        Otherwise DeepSpeed links the state to the parameters only once, after the first group's first step. The second
        group has no state then, so its moments could be neither read nor set (DeepSpeed 0.19.8).
        """
        base = self.engine.optimizer.optimizer
        for group in base.param_groups:
            for partition in group["params"]:
                partition.grad = torch.zeros_like(partition)
        base.step()
        base.zero_grad(set_to_none=True)
        self._count_from(0)
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _count_from(self, updates: int) -> None:
        base = self.engine.optimizer.optimizer
        for group in base.param_groups:
            if "step" in group:  # apex keeps the count here, torch beside the moments
                group["step"] = updates
            for state in (base.state[partition] for partition in group["params"]):
                if "step" in state:
                    state["step"].fill_(updates)

    def _poison_gradients(self) -> None:
        for gradients in self.engine.optimizer.averaged_gradients.values():
            for gradient in gradients:
                gradient.fill_(torch.nan)

    def _sum_partial(self) -> None:
        if self._topology.tp_size == 1 or not self._partial:
            return
        sum_partial_gradients(self.engine.optimizer.averaged_gradients[0], self._topology.tp_group)


def _mapping(parameter: nn.Parameter) -> Any:
    """Return DeepSpeed's record of a parameter's fragment in this rank's partition; None where it has none there."""
    linked: Any = parameter
    return linked._hp_mapping


def sum_partial_gradients(gradients: Sequence[Tensor], tp_group: ProcessGroup) -> None:
    """Sum gradients over tensor-parallel ranks, in place: the deferred sum, one flat all-reduce."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=tp_group)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, summed in zip(gradients, pieces, strict=True):
        gradient.copy_(summed.view_as(gradient))


@dataclass(frozen=True, eq=False)
class Engine:
    """The frozen model with Θ attached, and ZeRO's AdamW over Θ alone."""

    model: CausalLM
    theta: Theta
    optimiser: ZeroOptimiser
    device: torch.device

    def accumulate(self, step: int, batch: StepBatch) -> Tensor:
        """Compute the gradients of this rank's share of a global batch. Returns its summed loss, [] fp32, detached.

        step: from 0; determines the dropout masks.
        """
        self.model.train()
        total, last = torch.zeros((), device=self.device), len(batch.microbatches) - 1
        for index, microbatch in enumerate(batch.microbatches):
            moved = self._on_device(microbatch)
            self.theta.masks.set(step, moved.dropout_rows)
            compute = partial(self._loss, moved)
            total += self.optimiser.accumulate(compute, 1 / batch.global_targets, index == last)
        return total

    def step(self, lr: float, *, poison: bool = False) -> float:
        """Update Θ, and what its method derives from it. Returns the norm, as `ZeroOptimiser.step` does."""
        norm = self.optimiser.step(lr, poison=poison)
        self.theta.refresh()
        return norm

    def loss(self, batch: Microbatch) -> Tensor:
        """Return the summed loss of a microbatch's target tokens."""
        return self._loss(self._on_device(batch))

    def logits(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return `input_ids` [b, s] on the device and their logits [b, s, V]. A row is one sample from position 0."""
        input_ids = input_ids.to(self.device, non_blocking=True)
        positions = torch.arange(input_ids.size(1), device=self.device).expand_as(input_ids)
        return input_ids, self.model.logits(input_ids, positions)

    def _loss(self, batch: Microbatch) -> Tensor:
        return self.model.loss(
            batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments
        )

    def _on_device(self, batch: Microbatch) -> Microbatch:
        def move(value: Any) -> Any:
            return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

        return Microbatch(**{field.name: move(getattr(batch, field.name)) for field in fields(batch)})
