"""Guards and health: is this step fit to be taken, and how is each layer?

In: the loss and the gradients of a step, over all ranks. Out: a verdict, the same on every rank,
and numbers for metrics.jsonl. A guard remembers finite numbers only; what it remembers goes into
checkpoints, so that a resumed run judges as an undisturbed one would.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from yuzogpt.config import GuardSettings
from yuzogpt.runtime.world import World
from yuzogpt.training.parallel import ParallelModel, local

DECAY = 0.98  # of the running mean and variance of the loss: about the last 50 steps
WARM_AFTER = 50  # steps, before which nothing is called a spike
SMALLEST_DEVIATION = 0.01  # nats; a loss that hardly moves would make a spike of everything

Verdict = Literal["healthy", "spike", "not finite"]


@dataclass(frozen=True)
class StepStats:
    """What a step came to, over all ranks; the same numbers on each of them."""

    loss: float  # the mean over the global batch, nats a token
    stopping: bool  # whether any rank was asked to stop
    seconds: float  # of the step before, the mean over ranks
    gradient_norms: list[float]  # of each parameter that learns, in the model's order
    part_square: float = 0.0  # the square of the norm of a part's gradient, if that was measured

    @property
    def gradient_norm(self) -> float:
        """The norm of all gradients together."""
        return math.sqrt(sum(norm * norm for norm in self.gradient_norms))


def reduce_step_stats(
    trainee: ParallelModel,
    loss_sum: Tensor,
    tokens: int,
    stopping: bool,
    seconds: float,
    world: World,
    part_square: Tensor | None = None,
) -> StepStats:
    """Add up over ranks what one of them knows: its part of the loss, and of sharded gradients.

    One collective and one wait for the device a step.
    """
    squares = squares_of_gradients(trainee)
    told = [loss_sum, *loss_sum.new_tensor([stopping, seconds]), squares.new_zeros(())]
    if part_square is not None:  # under ddp each rank has a part of its own: their mean is taken
        told[-1] = part_square / (1 if trainee.kind == "fsdp" else world.size)
    own = torch.stack([value.to(squares.dtype) for value in told])
    if trainee.kind == "fsdp":
        totals = world.sum(torch.cat([own, squares]))
    else:
        totals = torch.cat([world.sum(own), squares])
    loss, wishes, seconds, part, *squared = totals.tolist()
    norms_of_all = [math.sqrt(value) for value in squared]
    return StepStats(loss / tokens, wishes > 0, seconds / world.size, norms_of_all, part)


def squares_of_gradients(trainee: ParallelModel) -> Tensor:
    """Return the square of the norm of each gradient, as far as this rank holds it."""
    norms = torch.stack(torch._foreach_norm(trainee.gradients()))
    return norms.double() ** 2 if norms.device.type != "mps" else norms**2


def weights_are_finite(trainee: ParallelModel, world: World) -> bool:
    """Tell whether all weights are numbers whose squares add up to one; call it on all ranks."""
    norms = torch._foreach_norm([local(p.detach()) for p in trainee.model.parameters()])
    return math.isfinite(world.sum(torch.stack(norms).sum()).item())


def clip(trainee: ParallelModel, norm: float, limit: float) -> bool:
    """Scale the gradients down to a norm of `limit`, if theirs is larger; tell whether it was."""
    if not limit or norm <= limit:
        return False
    torch._foreach_mul_(trainee.gradients(), limit / (norm + 1e-6))
    return True


@dataclass
class Guard:
    """Judges steps by their loss and gradient."""

    settings: GuardSettings
    mean: float = 0.0  # of the loss, running
    variance: float = 0.0
    seen: int = 0  # healthy steps
    skipped: int = 0  # steps, since the run began
    not_finite_in_a_row: int = 0

    def judge(self, totals: StepStats) -> Verdict:
        """Judge a step, and remember its loss if it is a number."""
        if not (math.isfinite(totals.loss) and math.isfinite(totals.gradient_norm)):
            return "not finite"
        verdict: Verdict = "spike" if totals.loss > self.highest_expected() else "healthy"
        # A spike counts as the highest loss expected: one does not spoil the mean, and a loss that
        # stays high stops being called a spike.
        self._remember(min(totals.loss, self.highest_expected()))
        return verdict

    def highest_expected(self) -> float:
        """Return the loss above which a step is a spike."""
        if not self.settings.spike_sigmas or self.seen < WARM_AFTER:
            return math.inf
        deviation = max(math.sqrt(self.variance), SMALLEST_DEVIATION)
        return self.mean + self.settings.spike_sigmas * deviation

    def _remember(self, loss: float) -> None:
        decay = min(DECAY, self.seen / (self.seen + 1))  # a plain mean, to begin with
        distance = loss - self.mean
        self.mean += (1 - decay) * distance
        self.variance = decay * (self.variance + (1 - decay) * distance * distance)
        self.seen += 1

    def takes(self, verdict: Verdict) -> bool:
        """Tell whether a step so judged is taken; count it if not."""
        is_taken = verdict == "healthy" or (verdict == "spike" and not self.settings.skip_spikes)
        self.skipped += not is_taken
        self.not_finite_in_a_row = (self.not_finite_in_a_row + 1) * (verdict == "not finite")
        return is_taken

    def gives_up(self) -> bool:
        """Tell whether so many steps in a row were not finite that the run should end."""
        return self.not_finite_in_a_row >= self.settings.max_nonfinite_steps

    @classmethod
    def remembering(cls, settings: GuardSettings, memory: dict[str, float]) -> "Guard":
        """Return a guard with what a checkpoint kept; a new one for an empty memory."""
        guard = cls(settings)
        vars(guard).update({name: memory[name] for name in guard.memory() if name in memory})
        return guard

    def memory(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {name: value for name, value in asdict(self).items() if name != "settings"}


def layer_of(name: str) -> str:
    """Return the layer that a parameter belongs to: wte, wpe, h.0, h.1, ..., ln_f."""
    return ".".join(name.split(".")[:2]) if name.startswith("h.") else name.split(".")[0]


def not_finite_layers(trainee: ParallelModel, totals: StepStats) -> list[str]:
    """Return the layers whose gradient is not finite, in the model's order."""
    pairs = zip(trainee.learning(), totals.gradient_norms, strict=True)
    return list(dict.fromkeys(layer_of(name) for name, norm in pairs if not math.isfinite(norm)))


class Health:
    """Looks at one step closely: gradient, weights and update of each layer.

    For the length of the step it holds the weights of before, then the updates, too.
    """

    def __init__(self, trainee: ParallelModel) -> None:
        """Make it before the optimizer's step."""
        self.trainee = trainee
        self.before = [weight.clone() for weight in trainee.weights()]

    def layers(self, totals: StepStats, world: World) -> dict[str, dict[str, float]]:
        """Return of each layer that learns gradient norm, weight norm, update over the latter.

        Call it after the optimizer's step, on every rank.
        """
        weights = self.trainee.weights()
        updates = torch._foreach_sub(weights, self.before)
        squares = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(updates)]) ** 2
        if self.trainee.kind == "fsdp":
            world.sum(squares)
        values = squares.tolist()
        sums: dict[str, list[float]] = {}
        for index, name in enumerate(self.trainee.learning()):
            gradient = totals.gradient_norms[index] ** 2
            layer = sums.setdefault(layer_of(name), [0.0, 0.0, 0.0])
            for place, value in enumerate((gradient, values[index], values[len(weights) + index])):
                layer[place] += value
        return {
            name: {
                "grad_norm": math.sqrt(gradient),
                "weight_norm": math.sqrt(weight),
                "update_to_weight": math.sqrt(update / weight) if weight else 0.0,
            }
            for name, (gradient, weight, update) in sums.items()
        }
