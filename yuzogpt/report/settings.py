"""The settings of a run that decide its result, as a table of its report."""

from collections.abc import Mapping, Sequence
from typing import Any

from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import leaves
from yuzogpt.report.tables import Table, plain

ALWAYS = ("dataset", "learning_rate", "batch_size", "gradient_accumulation_steps", "max_iters")


def table(settings: Mapping[str, Any]) -> list[Table]:
    """Return the frozen settings that differ from their defaults, and those in ALWAYS.

    `settings`: of a settings.yaml that may hold anything; what is no setting is left out.
    """
    rows: list[Sequence[str]] = []
    for dotted, field in leaves(TrainSettings):
        section, name = dotted.split(".")
        given, extra = settings.get(section), field.json_schema_extra
        value = given.get(name) if isinstance(given, dict) else None
        is_frozen = isinstance(extra, dict) and extra["frozen"]
        if isinstance(value, str | int | float) and (
            name in ALWAYS or (is_frozen and value != field.default)
        ):
            rows.append((name, plain(str(value)), str(field.default)))
    columns = ("setting", "value", "default")
    return [Table("Settings that decide the result", columns, rows, frozenset())] if rows else []
