"""Ray Data: the units of a source on any number of machines.

A read task of Ray Data reads, tokenizes and writes a unit. So no text and no tokens cross the
object store, memory is bounded by what the running tasks hold, and a task whose worker died is
repeated.
"""

import contextlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from yuzogpt.config import DistributedPrepareSettings, PrepareSettings
from yuzogpt.console.terminal import note
from yuzogpt.data.blocks import STAGE_STATS, PreparedCorpus
from yuzogpt.data.preparation import readers, shards
from yuzogpt.data.preparation.plan import Plan
from yuzogpt.data.preparation.prepare import prepare
from yuzogpt.data.preparation.shards import ShardConfig
from yuzogpt.data.preparation.sources import Unit
from yuzogpt.orchestration.causes import raised_as_ours
from yuzogpt.orchestration.cluster import check_reachable, connected
from yuzogpt.orchestration.environment import DATA, cluster_address, set_defaults
from yuzogpt.runtime.cores import available_cores


def prepare_on_ray(settings: PrepareSettings, directory: Path) -> tuple[PreparedCorpus, bool]:
    """Prepare a corpus on Ray, which starts only if there is something to do."""
    with RayWorkers(settings.preparation) as workers:
        return prepare(settings, directory, workers)


class RayWorkers:
    """Does units on an embedded Ray, or on the cluster that the settings name.

    A context manager: what it started ends with the block.
    """

    def __init__(self, settings: DistributedPrepareSettings) -> None:
        num_workers = settings.num_workers
        self.address = cluster_address(settings.ray_address)
        self.max_workers = num_workers if isinstance(num_workers, int) else None
        self.stack = contextlib.ExitStack()
        self.is_connected = False

    def __enter__(self) -> Self:
        """Return this; Ray starts when there is something to do."""
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def check(self) -> None:
        check_reachable(self.address)

    def count(self, units: Sequence[Unit]) -> list[int]:
        self.start()
        import ray

        count = ray.remote(readers.count_documents)
        with raised_as_ours("preparation"):
            counts: list[int] = ray.get([count.remote(unit) for unit in units])
        return counts

    def run(self, plan: Plan, units: Sequence[Unit]) -> None:
        self.start()
        warm_up(plan.shard_config)
        with raised_as_ours("preparation"):
            run_units(plan, units, self.max_workers)

    def start(self) -> None:
        """Start or join Ray, once."""
        if not self.is_connected:
            note("starting Ray ...")
            set_defaults(DATA)
            cores = self.max_workers or available_cores()
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


def run_units(plan: Plan, units: Sequence[Unit], max_workers: int | None) -> None:
    """Run the stage to its end."""
    import ray.data
    from ray.data import DataContext, ExecutionResources

    from yuzogpt.orchestration.data.datasource import UnitSource

    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours shows the whole corpus
    context.target_max_block_size = None  # a unit's blocks stay with its task
    context.memory_usage_poll_interval_s = None  # a thread in each task that only measures
    context.raise_original_map_exception = True  # Ray Data's own arrives without its cause
    context.op_resource_reservation_enabled = False  # one stage has all cores
    if max_workers is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=max_workers)
    source = UnitSource(units, plan.shard_config)
    stage = ray.data.read_datasource(source, override_num_blocks=len(units)).materialize()
    (plan.directory / STAGE_STATS).write_text(stage.stats())
