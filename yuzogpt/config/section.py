"""How a setting is declared: name, type, default, unit and help text. Knows no verb."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
NonNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]  # of a corpus: names a directory
Auto = Literal["auto"]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: read_names(value))]
Part = Literal["whole", "first", "second", "one"]  # of a split: all, a half, one window


# The help of settings that several verbs have.
STORAGE = "base directory or URI for relative paths; required under `ray job submit`"
RAY_ADDRESS = (
    "join the Ray cluster at this address; empty: RAY_ADDRESS if set, else start an embedded Ray"
)
MODEL = "run (its best checkpoint), checkpoint, Hugging Face folder, or gpt2 ... gpt2-xl"
CONTEXT = "context length; 0: the model's block_size; longer needs rotary or alibi positions"

# What a path may be. local: a path on this machine or on storage that all nodes share. here: a file
# that only this command reads. remote: local, or any URI. store: a directory, or a folder in a
# supported object store. model: store, or a published name.
PathKind = Literal["", "local", "here", "remote", "store", "model"]


def setting(
    default: Any,
    meaning: str,
    unit: str = "",
    *,
    frozen: bool = False,
    path: PathKind = "",
    if_empty: str = "",
    is_required: bool = False,
    escapes: bool = False,
) -> Any:
    """Declare one setting.

    `frozen` settings decide what a run computes: they may not change when the run is resumed.
    `path`: the value is a path; checkpoints/locations.py makes it absolute. An empty path stands
    for `if_empty`, where `{name}` is another setting of the section; without that it stays empty,
    or is refused if `is_required` or if the default is not empty. `escapes`: a flag may write line
    ends and tabs as `\\n` and `\\t`.
    """
    extra: dict[str, Any] = {"unit": unit, "frozen": frozen, "path": path, "if_empty": if_empty}
    extra |= {"is_required": is_required or default != "", "escapes": escapes}
    return Field(default, description=meaning, json_schema_extra=extra)


def read_workers(value: Any) -> Any:
    """Read a number of workers: auto, N, or MIN..MAX."""
    least, dots, most = str(value).partition("..")
    if value == "auto" or (least.isdigit() and not dots):
        return value if value == "auto" else int(least)
    if least.isdigit() and most.isdigit() and 0 < int(least) <= int(most):
        return f"{int(least)}..{int(most)}"
    raise ValueError("write auto, a number, or MIN..MAX such as 1..4")


def worker_range(workers: int | str, auto: int) -> tuple[int, int]:
    """Return the smallest and largest number that `read_workers` read; `auto` stands for auto."""
    count = auto if workers == "auto" else workers
    if isinstance(count, int):
        return count, count
    least, most = count.split("..")
    return int(least), int(most)


def read_names(value: Any) -> Any:
    """Read comma-separated names, or a list of them."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


def read_strings(value: Any) -> Any:
    """Read one string or several: a list, or JSON on the command line."""
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    return (value,) if isinstance(value, str) else value


class Section(BaseModel):
    """A group of settings: immutable; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def with_changes(settings: S, changes: Mapping[str, Any]) -> S:
    """Return a copy with other values: `{"run.out_dir": x, "data.data_dir": y}`.

    As in pydantic's model_copy, values are not validated, and changed settings count as set.
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

    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "auto: cuda or mps if available, else cpu"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "dtype of matrix products (autocast); auto: bfloat16 if the hardware supports it"
    )
    threads: Count = setting(0, "CPU threads per worker; 0: divide the node's cores", "threads")
