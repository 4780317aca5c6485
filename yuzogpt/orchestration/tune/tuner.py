"""Ray Tune: a sweep's trials, as many at a time as there is room for.

tuning/ decides what a trial is and which one is next. Ray starts trials, restarts one whose process
died, and stops those that fall behind. Its own state is in a private directory that is deleted with
the command and never read again: the sweep's directory is the only truth.

A trial of one worker trains in Tune's own process, which continues with the next trial: nothing is
imported, and no Ray Train started, in between. A trial of several workers starts a TorchTrainer.
"""

import contextlib
import logging
import math
import tempfile
from collections.abc import Iterator
from typing import Any

from yuzogpt.config import TrainSettings
from yuzogpt.console.terminal import note
from yuzogpt.errors import UserError
from yuzogpt.orchestration.cluster import check_reachable, connected, cores_of_nodes
from yuzogpt.orchestration.embedded import is_embedded
from yuzogpt.orchestration.environment import TUNE, cluster_address, set_defaults
from yuzogpt.orchestration.train.trainer import HEAVY_IMPORTS, set_environment
from yuzogpt.orchestration.tune.source import LOSS, STEP, Source
from yuzogpt.runtime.cores import available_cores, threads_asked
from yuzogpt.runtime.signals import stopped_by_sigterm
from yuzogpt.training.progress import take_wandb_key
from yuzogpt.tuning.search import Finals, Search
from yuzogpt.tuning.sweep import (
    RAY_DIR_PREFIX,
    Outcome,
    Sweep,
    collect_outcome,
    workers_of,
    write_outcome,
)
from yuzogpt.tuning.table import TrialTable

DRIVER_CPUS = 0.01  # of a trial whose workers are other processes; Tune accepts no 0


@contextlib.contextmanager
def on_ray(settings: TrainSettings) -> Iterator[None]:
    """Connect to Ray, for a sweep."""
    take_wandb_key(settings.log)  # no process of Ray's inherits it
    set_environment()
    set_defaults(TUNE)
    check_reachable(cluster_address(settings.workers.ray_address))
    cores = max(available_cores(), workers_of(settings.workers))
    note("starting Ray ...")
    with (
        stopped_by_sigterm("stopped (SIGTERM); the same command resumes it"),
        connected(settings.workers.ray_address, cores, HEAVY_IMPORTS, "ray.tune"),
    ):
        yield


def search(sweep: Sweep) -> Outcome:
    """Run a sweep, or the rest of it, on the Ray that this process is connected to."""
    options, steps = sweep.settings.sweep, sweep.base.schedule.max_iters
    slots_for(sweep.base, options.max_concurrent_trials)  # raises before anything is deleted
    if sweep.replaces_another:
        sweep.begin()
    trials = Search(sweep)
    try:
        with TrialTable(f"{trials.count} trials by {options.search_algorithm}", steps) as table:
            run_trials(sweep, trials, table, scheduled=options.scheduler == "asha")
        if finals := Finals.of(sweep, collect_outcome(sweep)):
            with TrialTable("the settings' own values against the winner", steps) as table:
                run_trials(sweep, finals, table, scored=True)
    except (KeyboardInterrupt, SystemExit):
        states = [trial["state"] for trial in collect_outcome(sweep)["trials"]]
        ended = len(states) - states.count("waiting")
        note(f"{ended} of {trials.count} trials have ended; the others resume at their checkpoints")
        raise
    finally:
        result = write_outcome(sweep)
    return result


def run_trials(
    sweep: Sweep,
    source: Source,
    table: TrialTable,
    *,
    scheduled: bool = False,
    scored: bool = False,
) -> None:
    """Run all trials of a source to their ends.

    `scheduled`: those that fall behind are stopped; `scored`: evaluated on data that no search saw.
    """
    from ray import tune

    from yuzogpt.orchestration.tune.callbacks import TableCallback, TrialSearcher
    from yuzogpt.orchestration.tune.trial import trainable

    slots, resources = slots_for(sweep.base, sweep.settings.sweep.max_concurrent_trials)
    slots = min(slots, source.count)
    threads = threads_for(sweep.base, slots)
    suggestions = TrialSearcher(source, scored=scored)
    callback = TableCallback(table, suggestions.kept)
    # Mode 0700, and where all nodes see it: Tune looks.
    with tempfile.TemporaryDirectory(prefix=RAY_DIR_PREFIX, dir=sweep.directory) as private:
        tuner = tune.Tuner(
            tune.with_resources(trainable(sweep, threads, scored=scored), resources),
            tune_config=tune.TuneConfig(
                metric=LOSS,
                mode="min",
                num_samples=source.count,
                max_concurrent_trials=slots,
                search_alg=suggestions,
                scheduler=asha(sweep) if scheduled else None,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=private,
                verbose=0,
                failure_config=tune.FailureConfig(sweep.base.workers.max_failures),
                callbacks=[callback],
            ),
        )
        # Tune logs at length which trials died, and that it cannot read what it did not write.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        tuner.fit()
    callback.settle()


def asha(sweep: Sweep) -> Any:
    """Return ASHA (Li et al., 2020), by optimizer steps."""
    from ray.tune.schedulers import ASHAScheduler

    options, steps = sweep.settings.sweep, sweep.base.schedule.max_iters
    grace = options.grace_steps or 2 * sweep.base.evaluation.eval_interval
    return ASHAScheduler(
        time_attr=STEP,
        max_t=steps + 1,
        grace_period=min(grace, steps),
        reduction_factor=options.reduction_factor,
    )


def slots_for(settings: TrainSettings, max_slots: int) -> tuple[int, dict[str, float]]:
    """Return how many trials run at a time, and what each holds while it does.

    Never more than find room with all of their workers: two that wait for each other's room would
    wait forever.
    """
    import ray

    resources = ray.cluster_resources()
    device, workers = settings.device.device, workers_of(settings.workers)
    use_gpu = device == "cuda" or (device == "auto" and resources.get("GPU", 0) > 0)
    resource = "GPU" if use_gpu else "CPU"
    count = int(resources.get(resource, 0))
    room = count // workers
    if not room:
        raise UserError(
            f"--num_workers={workers}: there are {count} {resource}(s) here, and a "
            "trial wants one for each of its workers"
        )
    slots = min(max_slots or room, room)
    if workers > 1:
        return slots, {"CPU": DRIVER_CPUS}
    return slots, {"GPU": 1, "CPU": 1} if use_gpu else {"CPU": 1}


def threads_for(settings: TrainSettings, slots: int) -> int:
    """Return the threads of each worker; concurrent trials share a node's cores."""
    nodes = cores_of_nodes() or [1]
    beside = math.ceil(slots * workers_of(settings.workers) / len(nodes))
    # An embedded Ray counts a core for each worker, although there may be fewer.
    cores = available_cores() if is_embedded() else min(nodes)
    return settings.device.threads or threads_asked() or max(1, cores // beside)
