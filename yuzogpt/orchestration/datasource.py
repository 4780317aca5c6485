"""A source's units as Ray Data sees them: a datasource, a function over blocks, and a datasink.

In: units. Out: their records. What happens to a unit is in data/readers.py and data/units.py.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Datasink, Datasource, ReadTask
from ray.data.block import Block, BlockMetadata

from yuzogpt.data import readers
from yuzogpt.data.blocks import PLAN
from yuzogpt.data.readers import Batch
from yuzogpt.data.sources import Unit
from yuzogpt.data.units import Recipe, UnitWriter, tokenize, tokenizer_of
from yuzogpt.errors import UserError
from yuzogpt.orchestration.causes import raised_as_ours

# The row that ends each unit: without it the sink could not tell a whole unit from one cut short.
END = "end of unit"
# What goes wrong leaves a task as one of our errors: into others Ray Data writes its advice, and
# the name of a file gets lost.
FAILURES = ("preparation", Exception)


class UnitSource(Datasource):  # type: ignore[misc]  # ray.data is not typed
    """Gives each unit its own read task."""

    def __init__(self, units: Sequence[Unit], recipe: Recipe) -> None:
        """Nothing is read yet."""
        self.units = units
        self.recipe = recipe

    def estimate_inmemory_data_size(self) -> int | None:
        """How many bytes the documents have."""
        return sum(unit.bytes for unit in self.units)

    def get_read_tasks(self, *_: object, **__: object) -> list[ReadTask]:
        """Return a task for each unit, however many are asked for."""
        return [
            ReadTask(
                functools.partial(read_tables, unit, self.recipe),  # not all units: each is pickled
                BlockMetadata(
                    num_rows=unit.documents,
                    size_bytes=unit.bytes,
                    input_files=[unit.path],
                    exec_stats=None,
                ),
            )
            for unit in self.units
        ]


def read_tables(unit: Unit, recipe: Recipe) -> Iterator[pa.Table]:
    """Yield a unit's documents, and the row that ends it."""
    if not (Path(recipe.staging) / PLAN).exists():
        raise UserError(
            f"{Path(recipe.staging).parent}: not the same directory on every node; choose a "
            "--data_dir on storage that all nodes share"
        )
    with raised_as_ours(*FAILURES):
        for batch in readers.read(unit, recipe.text_column, recipe.max_document_bytes):
            yield to_table(batch, unit)
    yield to_table(Batch([None], [END]), unit)


def to_table(batch: Batch, unit: Unit) -> pa.Table:
    """Hand a batch to Ray Data."""
    return pa.table(
        {
            "unit": pa.array(np.full(len(batch.documents), unit.index, np.int32)),
            "document": pa.array(batch.documents, pa.large_binary()),
            "reason": pa.array(batch.reasons, pa.string()),
        }
    )


def tokenize_table(table: pa.Table, recipe: Recipe) -> pa.Table:
    """Tokenize what the read task handed over."""
    with raised_as_ours(*FAILURES):
        batch = Batch(table["document"].to_pylist(), table["reason"].to_pylist())
        tokenized = tokenize(batch, recipe, tokenizer_of(recipe.staging))
    return tokenized.add_column(0, "unit", table["unit"])


class UnitSink(Datasink[None]):  # type: ignore[misc]
    """Writes the units that its task read."""

    def __init__(self, units: Sequence[Unit], recipe: Recipe) -> None:
        """Nothing is written yet."""
        self.units = {unit.index: unit for unit in units}
        self.recipe = recipe

    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """Write the units in `blocks`: one after the other, each whole."""
        with raised_as_ours(*FAILURES):
            self._write(blocks)

    def _write(self, blocks: Iterable[Block]) -> None:
        node = ray.get_runtime_context().get_node_id()
        writer: UnitWriter | None = None
        for table in blocks:
            assert isinstance(table, pa.Table)
            indices = table["unit"].to_numpy()
            ends = [*(np.flatnonzero(np.diff(indices)) + 1), len(indices)]
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                writer = writer or UnitWriter(self.units[int(indices[start])], self.recipe)
                assert writer.unit.index == indices[start], "units came mixed"
                piece = table.slice(start, end - start)
                is_end = piece["reason"][-1].as_py() == END
                writer.add(piece.slice(0, len(piece) - is_end))
                if is_end:
                    writer.finish(node)
                    writer = None
        if writer is not None:
            raise RuntimeError(f"unit {writer.unit.index} was cut short")
