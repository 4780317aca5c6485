"""How long a run is, and the learning rate of each of its steps.

The learning rate is a pure function of the settings and the step, from 0. So a run may be resumed
with another schedule, as long as the steps that it has made keep their learning rates.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, ValidationError, model_validator

from yuzogpt.config.registry import OneOf, Registry
from yuzogpt.config.section import Count, NonNegative, Positive, Section, setting
from yuzogpt.errors import UserError

if TYPE_CHECKING:
    from yuzogpt.config.train import TrainSettings


@dataclass(frozen=True)
class Decay:
    """A part of a schedule: warmup to `peak` from step `begin`, then decay until step `end`."""

    begin: int
    end: int
    peak: float | None  # None: the learning rate at `begin`


@lru_cache
def read_redecay(text: str) -> tuple[Decay, ...]:
    """Read `BEGIN..END@RATE`, or several with commas; ValueError if they are not in order."""
    decays: list[Decay] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        steps, _, rate = part.partition("@")
        begin, _, end = steps.partition("..")
        try:
            decay = Decay(int(begin), int(end), float(rate) if rate else None)
        except ValueError:
            raise ValueError(
                "write BEGIN..END or BEGIN..END@RATE, such as 200..1000@0.01"
            ) from None
        last = decays[-1].begin if decays else 0
        if not (last < decay.begin < decay.end and 0 <= (decay.peak or 0.0) < math.inf):
            raise ValueError(f"{part}: needs {last} < BEGIN < END, and a RATE of 0 or more")
        decays.append(decay)
    return tuple(decays)


def check_redecay(text: str) -> str:
    """Return the text; ValueError if it cannot be read."""
    read_redecay(text)
    return text


# (steps made in the decay, its length, cooldown_iters) -> share of peak - min_lr that is left.
LR_SCHEDULES = Registry[Callable[[int, int, int], float]]("learning-rate schedule")


@LR_SCHEDULES.register("cosine", help="half a cosine")
def cosine(made: int, length: int, cooldown: int) -> float:
    """Slow at both ends."""
    return (1 + math.cos(math.pi * (made / length))) / 2


@LR_SCHEDULES.register("linear", help="a straight line")
def linear(made: int, length: int, cooldown: int) -> float:
    """The same decrease in each step."""
    return 1 - made / length


@LR_SCHEDULES.register("wsd", help="constant, then linear over the last cooldown_iters")
def wsd(made: int, length: int, cooldown: int) -> float:
    """Warmup, stable, decay: MiniCPM (Hu et al., 2024)."""
    cooldown = min(cooldown, length)
    return 1 - max(0, made - (length - cooldown)) / cooldown


class ScheduleSettings(Section):
    """Number of steps, and the learning rate at each."""

    max_iters: Positive = setting(600_000, "total optimizer steps", "steps")
    decay_lr: bool = setting(
        True, "decay the learning rate to min_lr; False: keep it constant", frozen=True
    )
    lr_schedule: Annotated[str, OneOf("yuzogpt.config.schedule:LR_SCHEDULES")] = setting(
        "cosine", "shape of the decay", frozen=True
    )
    warmup_iters: Count = setting(2_000, "linear warmup", "steps", frozen=True)
    lr_decay_iters: Positive = setting(
        600_000, "step at which the decay ends", "steps", frozen=True
    )
    cooldown_iters: Count = setting(0, "wsd: length of the linear decay", "steps", frozen=True)
    min_lr: NonNegative = setting(6e-5, "learning rate after the decay", frozen=True)
    redecay: Annotated[str, AfterValidator(check_redecay)] = setting(
        "",
        "prolong a run by decaying to min_lr again: BEGIN..END@RATE, in steps, from learning rate "
        "RATE (default: the rate at BEGIN); separate several with commas",
        frozen=True,
    )

    @model_validator(mode="after")
    def cooldown_is_given(self) -> Self:
        """A wsd schedule needs the length of its decay."""
        decays = self.decay_lr or self.redecay
        if decays and self.lr_schedule == "wsd" and not self.cooldown_iters:
            raise ValueError("lr_schedule=wsd: set cooldown_iters, the length of its decay")
        return self

    @property
    def decay_end(self) -> int | None:
        """The step after which the learning rate no longer changes; None: it is constant."""
        further = read_redecay(self.redecay)
        if further:
            return further[-1].end
        return self.lr_decay_iters if self.decay_lr else None

    def lr_at(self, step: int, peak: float) -> float:
        """Return the learning rate of `step`; `peak` is the optimizer's learning_rate.

        Linear warmup, decay, then min_lr; the same again at the beginning of each redecay, as
        Ibrahim et al., 2024, do.
        """
        further = read_redecay(self.redecay)
        begun = next((n for n in range(len(further), 0, -1) if step >= further[n - 1].begin), 0)
        return self._lr_in_part(step, peak, further[:begun])

    def _lr_in_part(self, step: int, peak: float, further: tuple[Decay, ...]) -> float:
        """Return the learning rate of `step`; `further` are the redecays begun by then."""
        low, first, end, warmup = 0.0, 0, self.lr_decay_iters, self.warmup_iters
        if further:
            first, end = further[-1].begin, further[-1].end
            low = self._lr_in_part(first, peak, further[:-1])
            peak = low if further[-1].peak is None else further[-1].peak
            warmup = warmup if peak > low else 0
        elif not self.decay_lr:
            return peak
        begin = first + warmup
        if step < begin:
            return low + (peak - low) * (step - first + 1) / (warmup + 1)
        if step >= end:
            return self.min_lr
        left = LR_SCHEDULES[self.lr_schedule](step - begin, end - begin, self.cooldown_iters)
        return self.min_lr + (peak - self.min_lr) * left


def first_changed_step(
    before: Mapping[str, Any], peak: float, schedule: ScheduleSettings, steps: int
) -> int | None:
    """Return the first of `steps` steps whose learning rate differs; None if all are equal.

    `before`: the schedule settings that the steps were made with, by this version or another.
    """
    known = {name: before[name] for name in ScheduleSettings.model_fields if name in before}
    try:
        old = ScheduleSettings.model_validate(known)
    except ValidationError:
        return 0
    if old.model_copy(update={"max_iters": schedule.max_iters}) == schedule:
        return None
    changed = (s for s in range(steps) if old.lr_at(s, peak) != schedule.lr_at(s, peak))
    return next(changed, None)


def redecay_flag(redecay: str, step: int, end: int | str) -> str:
    """Return the flag that adds a decay from `step` to `end` to those of `redecay`."""
    return "--redecay=" + ",".join(filter(None, (redecay, f"{step}..{end}@RATE")))


def check_learning_rates(settings: "TrainSettings", made: int | None) -> None:
    """Raise UserError if the learning rate would rise to min_lr, or be 0, in steps to come.

    `made`: the steps that a resumed run has made; None for a new run. A resumed run may still make
    its steps before the first with learning rate 0.
    """
    schedule, optimizer = settings.schedule, settings.optimizer
    peak, last, step = optimizer.learning_rate, schedule.max_iters, made or 0
    is_explicit = "learning_rate" in optimizer.model_fields_set
    is_explicit = is_explicit and "min_lr" in schedule.model_fields_set
    if made is None and schedule.decay_lr and peak < schedule.min_lr and is_explicit:
        raise UserError(
            f"learning_rate={peak:g} is below min_lr={schedule.min_lr:g}, to which it decays; "
            "lower --min_lr, or set --decay_lr=False"
        )
    if settings.evaluation.eval_only or not peak or step >= last or schedule.lr_at(last - 1, peak):
        return
    idle = next(s for s in range(step, last) if not schedule.lr_at(s, peak))
    if made is not None and idle > made:
        return
    later = schedule.model_copy(update={"lr_decay_iters": last})
    hint = f"--lr_decay_iters={last} decays to the end"
    if schedule.redecay or first_changed_step(schedule.model_dump(), peak, later, step) is not None:
        hint = f"{redecay_flag(schedule.redecay, step, last)} decays again, from RATE"
    raise UserError(
        f"--max_iters={last}: learning rate 0 from step {idle} on (min_lr={schedule.min_lr:g}); "
        f"{hint}"
    )


def continuation_hint(schedule: ScheduleSettings) -> str:
    """Return how to continue a run that has made max_iters steps."""
    step, end = schedule.max_iters, schedule.decay_end
    if end is None:
        return "raise --max_iters to continue"
    if step < end:
        return f"raise --max_iters, to {end} at most for the same decay, to continue"
    again = f"with {redecay_flag(schedule.redecay, step, 'N')} to decay again"
    if schedule.min_lr:
        return f"raise --max_iters to N to continue at min_lr={schedule.min_lr:g}, {again}"
    return f"raise --max_iters to N, {again}, to continue"


def schedule_notices(schedule: ScheduleSettings, peak: float) -> list[str]:
    """Return what may surprise about the learning rates of a run, one line each."""
    lines, end = [], schedule.decay_end
    if schedule.decay_lr and peak < schedule.min_lr:
        lines.append(
            f"the learning rate rises from {peak:g} to min_lr={schedule.min_lr:g}: lower --min_lr"
        )
    if end is not None and schedule.max_iters > end:
        where = "redecay" if schedule.redecay else f"lr_decay_iters={end}"
        lines.append(
            f"learning rate: stays at min_lr={schedule.min_lr:g} from step {end} on ({where})"
        )
    return lines
