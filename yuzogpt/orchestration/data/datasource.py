"""A source's units as Ray Data sees them: each read task reads, tokenizes and writes one unit.

Ray Data gets a row for each; the work is in data/preparation/shards.py. Documents are not handed
from a read task to a datasink: Ray Data keeps all that passes between them until the task ends.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from yuzogpt.data.blocks import PLAN
from yuzogpt.data.preparation.shards import ShardConfig, load_tokenizer, run_unit
from yuzogpt.data.preparation.sources import Unit
from yuzogpt.errors import UserError
from yuzogpt.orchestration.causes import raised_as_ours

# Failures leave a task as errors of ours. To others Ray Data adds its advice, and the file name
# is lost.
FAILURES = ("preparation", Exception)


class UnitSource(Datasource):  # type: ignore[misc]  # ray.data is not typed
    """Gives each unit its own read task."""

    def __init__(self, units: Sequence[Unit], config: ShardConfig) -> None:
        self.units = units
        self.config = config

    def estimate_inmemory_data_size(self) -> int | None:
        """How many bytes the documents have."""
        return sum(unit.bytes for unit in self.units)

    def get_read_tasks(self, *_: object, **__: object) -> list[ReadTask]:
        """Return a task for each unit, however many are asked for."""
        return [
            ReadTask(
                functools.partial(do, unit, self.config),  # not all units: each is pickled
                BlockMetadata(
                    num_rows=1, size_bytes=None, input_files=[unit.path], exec_stats=None
                ),
            )
            for unit in self.units
        ]


def do(unit: Unit, config: ShardConfig) -> Iterator[pa.Table]:
    """Read, tokenize and write a unit; yield its number."""
    if not (Path(config.staging) / PLAN).exists():
        raise UserError(
            f"{Path(config.staging).parent}: not the same directory on every node; choose a "
            "--data_dir on storage that all nodes share"
        )
    node = ray.get_runtime_context().get_node_id()
    with raised_as_ours(*FAILURES):
        run_unit(unit, config, load_tokenizer(config.staging), node)
    yield pa.table({"unit": [unit.index]})
