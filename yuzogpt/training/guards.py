"""Guards: which steps are applied, and when a run is aborted.

A step's verdict follows from its loss and gradients, reduced over all ranks, so it is the same on
every rank. A guard's state goes into checkpoints, so that a resumed run judges each step as an
uninterrupted run would. It holds finite numbers only, because JSON has no others.

Next: training/loop.py.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from yuzogpt.config import GuardSettings
from yuzogpt.runtime.torch_internals import multiply_, vector_norms
from yuzogpt.runtime.world import World
from yuzogpt.training.parallel import ParallelModel, to_local

EMA_DECAY = 0.98  # of the loss's running mean and variance: about the last 50 steps
WARMUP_STEPS = 50  # during which no loss is called a spike
MIN_DEVIATION_NATS = 0.01  # without it, any change of a loss that hardly moves would be a spike

Verdict = Literal["healthy", "spike", "not finite"]


@dataclass(frozen=True)
class StepStats:
    """Statistics of one step, reduced over all ranks; equal on every rank."""

    loss: float  # the mean over the global batch, in nats per token
    stop_requested: bool  # whether any rank was asked to stop
    seconds: float  # duration of the previous step, the mean over ranks
    grad_norms: list[float]  # of each trainable parameter, in the model's order
    micro_grad_sq_norm: float = 0.0  # of one micro-batch, for the gradient noise scale

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients together."""
        return math.sqrt(sum(norm * norm for norm in self.grad_norms))


def reduce_step_stats(
    model: ParallelModel,
    loss_sum: Tensor,
    tokens: int,
    stop_requested: bool,
    seconds: float,
    world: World,
    micro_grad_sq_norm: Tensor | None = None,
) -> StepStats:
    """Sum each rank's share of the loss, and of sharded gradients, over all ranks.

    One collective per step.
    """
    sq_norms = squared_grad_norms(model)
    micro = sq_norms.new_zeros(())
    if micro_grad_sq_norm is not None:
        # FSDP has averaged the micro-batch's gradient over ranks, and each rank has a shard's share
        # of its norm: the sum is wanted. DDP has not: the mean of the ranks' norms is wanted.
        micro = micro_grad_sq_norm / (1 if model.kind == "fsdp" else world.size)
    local = [loss_sum, *loss_sum.new_tensor([stop_requested, seconds]), micro]
    packed = torch.stack([value.to(sq_norms.dtype) for value in local])
    if model.kind == "fsdp":
        reduced = world.all_reduce_(torch.cat([packed, sq_norms]))
    else:
        reduced = torch.cat([world.all_reduce_(packed), sq_norms])
    loss, stop_requests, total_seconds, micro_sq_norm, *totals = reduced.tolist()
    norms = [math.sqrt(total) for total in totals]
    return StepStats(
        loss / tokens, stop_requests > 0, total_seconds / world.size, norms, micro_sq_norm
    )


def squared_grad_norms(model: ParallelModel) -> Tensor:
    """Return the squared norm of each gradient, of the part that this rank holds."""
    norms = torch.stack(vector_norms(model.gradients()))
    return norms.double() ** 2 if norms.device.type != "mps" else norms**2


def weights_are_finite(model: ParallelModel, world: World) -> bool:
    """Return whether all weights are finite; call it on all ranks."""
    norms = vector_norms([to_local(p.detach()) for p in model.gpt.parameters()])
    return math.isfinite(world.all_reduce_(torch.stack(norms).sum()).item())


def clip_grad_norm(model: ParallelModel, norm: float, max_norm: float) -> bool:
    """Scale gradients of norm `norm` to `max_norm` if it is larger; return whether it was.

    Not torch's clip_grad_norm_: the norm is known by now, over the shards of all ranks.
    """
    if not max_norm or norm <= max_norm:
        return False
    multiply_(model.gradients(), max_norm / (norm + 1e-6))
    return True


@dataclass
class Guard:
    """Judges steps by their loss and gradient."""

    settings: GuardSettings
    # All of the following is state that checkpoints hold.
    mean: float = 0.0  # running mean of the loss
    variance: float = 0.0
    seen: int = 0  # steps with a finite loss and gradient
    skipped: int = 0  # steps that were not applied, in the whole run
    not_finite_in_a_row: int = 0

    def check(self, stats: StepStats) -> Verdict:
        """Judge a step, and update the running mean if loss and gradient are finite."""
        if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
            return "not finite"
        verdict: Verdict = "spike" if stats.loss > self.spike_threshold() else "healthy"
        # A spike is clamped to the threshold before it enters the mean: a single one does not
        # distort the mean, and a loss that stays high stops being called a spike.
        self._update(min(stats.loss, self.spike_threshold()))
        return verdict

    def spike_threshold(self) -> float:
        """Return the loss above which a step is a spike."""
        if not self.settings.spike_sigmas or self.seen < WARMUP_STEPS:
            return math.inf
        deviation = max(math.sqrt(self.variance), MIN_DEVIATION_NATS)
        return self.mean + self.settings.spike_sigmas * deviation

    def _update(self, loss: float) -> None:
        decay = min(EMA_DECAY, self.seen / (self.seen + 1))  # a plain mean at first
        distance = loss - self.mean
        self.mean += (1 - decay) * distance
        self.variance = decay * (self.variance + (1 - decay) * distance * distance)
        self.seen += 1

    def should_apply(self, verdict: Verdict) -> bool:
        """Return whether a step with this verdict is applied; count it if not."""
        is_applied = verdict == "healthy" or (verdict == "spike" and not self.settings.skip_spikes)
        self.skipped += not is_applied
        self.not_finite_in_a_row = self.not_finite_in_a_row + 1 if verdict == "not finite" else 0
        return is_applied

    def should_abort(self) -> bool:
        """Return whether so many steps in a row were not finite that the run should end."""
        return self.not_finite_in_a_row >= self.settings.max_nonfinite_steps

    @classmethod
    def from_state(cls, settings: GuardSettings, state: dict[str, float]) -> "Guard":
        """Return a guard with a checkpoint's state; a new one if the state is empty."""
        guard = cls(settings)
        vars(guard).update({name: state[name] for name in guard.state_dict() if name in state})
        return guard

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "settings"}
