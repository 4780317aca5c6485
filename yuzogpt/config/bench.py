"""`yuzogpt bench`: how long a training step takes."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from yuzogpt.config.section import Count, Names, Positive, Section, setting
from yuzogpt.config.train import TrainSettings


def read_numbers(value: Any) -> Any:
    """Read comma-separated whole numbers, or a list of them."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int) else value


Numbers = Annotated[tuple[int, ...], BeforeValidator(read_numbers)]
LAUNCHERS = ("bare", "torchrun", "ray")
TRACED_STEPS = 3


class BenchmarkedSettings(Section):
    """What is measured, and against what."""

    steps: Positive = setting(20, "steps to measure; their median is reported", "steps")
    warmup_steps: Count = setting(5, "steps before the measured ones", "steps")
    launchers: Names = setting(
        ("bare",), "comma-separated: bare (one process, no launcher), torchrun, ray"
    )
    world_sizes: Numbers = setting(
        (1,),
        "comma-separated numbers of workers for torchrun and ray, to see how they scale",
        "workers",
    )
    synthetic: bool = setting(
        True, "use random tokens, with the corpus's vocabulary; False: read the corpus"
    )
    trace: str = setting(
        "", "file for a trace of three bare steps (open it in chrome://tracing)", path="local"
    )
    output: Literal["table", "json"] = setting("table", "--json is short for --output=json")

    @model_validator(mode="after")
    def launchers_are_known(self) -> Self:
        """Launchers exist, and a trace has enough steps."""
        for name in self.launchers:
            if name not in LAUNCHERS:
                raise ValueError(f"launchers={name}: unknown; known: {', '.join(LAUNCHERS)}")
        if self.trace and "bare" not in self.launchers:
            raise ValueError(f"trace={self.trace}: needs bare among the launchers")
        if self.trace and self.warmup_steps + self.steps <= TRACED_STEPS:
            raise ValueError(
                f"trace={self.trace}: needs more than {TRACED_STEPS} steps in all "
                "(warmup_steps + steps)"
            )
        if not self.launchers or not self.world_sizes or min(self.world_sizes) < 1:
            raise ValueError("give at least one launcher, and world_sizes of 1 or more")
        return self


class BenchSettings(TrainSettings):
    """`yuzogpt bench`: the settings of `yuzogpt train`, and how its speed is measured."""

    bench: BenchmarkedSettings = BenchmarkedSettings()
