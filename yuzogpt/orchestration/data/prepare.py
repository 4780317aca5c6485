"""Ray Data: the units of a source on any number of machines.

In: a plan and the units that are not done. Out: their blocks and records in the staging directory.
A read task of Ray Data reads, tokenizes and writes a unit. So no text and no tokens cross the
object store, memory is bounded by what the tasks that run hold, and a task whose worker died is
done again.
"""

import contextlib
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from yuzogpt.config import DistributedPrepareSettings, PrepareSettings
from yuzogpt.data.blocks import STAGE_STATS, PreparedCorpus
from yuzogpt.data.preparation import readers, shards
from yuzogpt.data.preparation.plan import Plan
from yuzogpt.data.preparation.prepare import prepare
from yuzogpt.data.preparation.shards import ShardConfig
from yuzogpt.data.preparation.sources import Unit
from yuzogpt.orchestration.causes import raised_as_ours
from yuzogpt.orchestration.cluster import check_reachable, connected
from yuzogpt.runtime.cores import available_cores

# Set before ray is imported and starts; its workers inherit them.
ENVIRONMENT = {
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # what went wrong is told in a line; its files have it all
    # Memory is kept and used again, not returned: page faults cost more than tokenizing a little.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}


def prepare_on_ray(settings: PrepareSettings, directory: Path) -> tuple[PreparedCorpus, bool]:
    """Prepare a corpus on Ray, which starts only if there is something to do."""
    with RayWorkers(settings.preparation) as workers:
        return prepare(settings, directory, workers)


class RayWorkers:
    """Does units on an embedded Ray, or on the cluster that the settings name.

    A context manager: what it started ends with the block.
    """

    def __init__(self, settings: DistributedPrepareSettings) -> None:
        """Ray starts when there is something to do."""
        wanted = settings.num_workers
        self.address = settings.ray_address or os.environ.get("RAY_ADDRESS", "")
        self.most = wanted if isinstance(wanted, int) else None
        self.stack = contextlib.ExitStack()
        self.is_connected = False

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(self, *error: Any) -> None:
        """End the embedded Ray, if one was started."""
        self.stack.__exit__(*error)

    def check(self) -> None:
        """Raise UserError if the cluster does not answer."""
        check_reachable(self.address)

    def count(self, listed: Sequence[Unit]) -> list[int]:
        """Count the documents of each unit."""
        self.start()
        import ray

        count = ray.remote(readers.count_documents)
        with raised_as_ours("preparation"):
            counts: list[int] = ray.get([count.remote(unit) for unit in listed])
        return counts

    def run(self, plan: Plan, undone: Sequence[Unit]) -> None:
        """Do units."""
        self.start()
        warm_up(plan.shard_config)
        with raised_as_ours("preparation"):
            run_units(plan, undone, self.most)

    def start(self) -> None:
        """Start or join Ray, once."""
        if not self.is_connected:
            print("starting Ray ...", flush=True)
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            cores = self.most or available_cores()
            heavy = ("pandas", "pyarrow.dataset", "numpy")
            self.stack.enter_context(connected(self.address, cores, heavy, "ray.data"))
            self.is_connected = True


def warm_up(config: ShardConfig) -> None:
    """Let idle workers import what they will need while this process imports Ray Data."""
    import ray

    def load() -> None:
        import_module("ray.data")
        shards.load_tokenizer(config.staging)

    task = ray.remote(load)
    for _ in range(int(ray.cluster_resources().get("CPU", 1))):
        task.remote()


def run_units(plan: Plan, undone: Sequence[Unit], most: int | None) -> None:
    """Run the stage to its end."""
    import ray.data
    from ray.data import DataContext, ExecutionResources

    from yuzogpt.orchestration.data.datasource import UnitSource

    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours knows the whole corpus
    context.target_max_block_size = None  # a unit's blocks stay with its task
    context.memory_usage_poll_interval_s = None  # a thread in each task that only measures
    context.raise_original_map_exception = True  # its own has no cause when it arrives here
    context.op_resource_reservation_enabled = False  # one stage: all cores are its
    if most is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=most)
    source = UnitSource(undone, plan.shard_config)
    stage = ray.data.read_datasource(source, override_num_blocks=len(undone)).materialize()
    (plan.directory / STAGE_STATS).write_text(stage.stats())
