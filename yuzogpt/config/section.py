"""What a setting is: a name, a default, a unit, a meaning. Knows no verb."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
NonNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]  # of a corpus, and its directory
Auto = Literal["auto"]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: read_names(value))]
Part = Literal["whole", "first", "second", "one"]  # of a split: all, a half, a single window


def setting(default: Any, meaning: str, unit: str = "", *, frozen: bool = False) -> Any:
    """Declare one setting.

    `frozen` settings decide what a run computes: they may not change when the run is resumed.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "frozen": frozen})


def read_workers(value: Any) -> Any:
    """Read how many workers: auto, a number, or least..most."""
    least, dots, most = str(value).partition("..")
    if value == "auto" or (least.isdigit() and not dots):
        return value if value == "auto" else int(least)
    if least.isdigit() and most.isdigit() and 0 < int(least) <= int(most):
        return f"{int(least)}..{int(most)}"
    raise ValueError("write auto, a number, or least..most such as 1..4")


def span_of(workers: int | str, auto: int) -> tuple[int, int]:
    """Return the least and the most of what `read_workers` read; `auto`: how many that is."""
    wanted = auto if workers == "auto" else workers
    if isinstance(wanted, int):
        return wanted, wanted
    least, most = wanted.split("..")
    return int(least), int(most)


def read_names(value: Any) -> Any:
    """Read names with commas between, or a list of them."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


def read_strings(value: Any) -> Any:
    """Read one string, or a list of them, which on the command line is JSON."""
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    return (value,) if isinstance(value, str) else value


class Section(BaseModel):
    """A group of settings: immutable, and without room for a misspelt one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def with_changes(settings: S, changes: Mapping[str, Any]) -> S:
    """Return settings with other values: `{"run.out_dir": x, "data.data_dir": y}`.

    As pydantic's model_copy: values are not validated, and what is changed counts as set.
    """
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        section, leaf = dotted.split(".")
        assert leaf in type(getattr(settings, section)).model_fields, dotted
        sections.setdefault(section, {})[leaf] = value
    return settings.model_copy(
        update={
            name: getattr(settings, name).model_copy(update=leaves)
            for name, leaves in sections.items()
        }
    )


class DeviceSettings(Section):
    """What the arithmetic runs on."""

    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "auto: cuda, mps, else cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of matrix products (autocast); auto: bfloat16 where the hardware has it"
    )
    threads: Count = setting(0, "per worker; 0: the node's cores shared out", "threads")
