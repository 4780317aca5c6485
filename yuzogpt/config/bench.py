"""`yuzogpt bench`: what a training step costs."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from yuzogpt.config.section import Count, Names, Positive, Section, setting
from yuzogpt.config.train import TrainSettings


def read_numbers(value: Any) -> Any:
    """Read whole numbers with commas between, or a list of them."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int) else value


Numbers = Annotated[tuple[int, ...], BeforeValidator(read_numbers)]
LAUNCHERS = ("bare", "torchrun", "ray")
TRACED = 3  # steps


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
        "",
        "file for a trace of three bare steps (open it in chrome://tracing)",
        path="local",
        if_empty="",
    )
    output: Literal["table", "json"] = setting("table", "--json is short for --output=json")

    @model_validator(mode="after")
    def launchers_are_known(self) -> Self:
        """Only what there is."""
        for name in self.launchers:
            if name not in LAUNCHERS:
                raise ValueError(f"launchers={name}: not one of {', '.join(LAUNCHERS)}")
        if self.trace and "bare" not in self.launchers:
            raise ValueError(f"trace={self.trace}: only launchers=bare is traced")
        if self.trace and self.warmup_steps + self.steps <= TRACED:
            raise ValueError(f"trace={self.trace}: the last {TRACED} of more steps")
        if not self.launchers or not self.world_sizes or min(self.world_sizes) < 1:
            raise ValueError("give at least one launcher, and worlds of at least one worker")
        return self


class BenchSettings(TrainSettings):
    """`yuzogpt bench`: what of `yuzogpt train` decides how fast it is, and how that is measured."""

    bench: BenchmarkedSettings = BenchmarkedSettings()
