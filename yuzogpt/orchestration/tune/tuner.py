"""Ray Tune: a sweep's trials, as many at a time as there is room for.

In: a sweep. Out: its trials, each over, and a board that told of them. What a trial is and what
comes next is core (tuning/); Ray starts trials, starts one again whose process died, and stops
those that fall behind. Its own state is in a private directory that ends with the command and is
never read again: the sweep's directory is the only truth.

A trial of one worker trains in Tune's own process, which goes on with the next trial: nothing is
imported, and no Ray Train started, between two. A trial of several workers starts a TorchTrainer.
"""

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from yuzogpt.config import TrainSettings
from yuzogpt.errors import UserError
from yuzogpt.orchestration.cluster import check_reachable, connected, cores_of_nodes
from yuzogpt.orchestration.embedded import is_embedded
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

# Set before ray is imported.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl has it all
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, which goes on when repeated
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # nobody reads Tune's own state
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the board shows what there is to see
}
TRACE = 0.01  # of a CPU: what a trial takes whose workers are other processes; Tune takes no 0


@contextlib.contextmanager
def on_ray(settings: TrainSettings) -> Iterator[None]:
    """Connect to Ray, for a sweep."""
    take_wandb_key(settings.log)  # no process of Ray's inherits it
    set_environment()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    check_reachable(settings.workers.ray_address or os.environ.get("RAY_ADDRESS", ""))
    cores = max(available_cores(), workers_of(settings))
    print("starting Ray ...", flush=True)
    with (
        stopped_by_sigterm("stopped (SIGTERM); the same command resumes it"),
        connected(settings.workers.ray_address, cores, HEAVY_IMPORTS, "ray.tune"),
    ):
        yield


def search(sweep: Sweep) -> Outcome:
    """Do a sweep, or what is left of it, on the Ray that this process is connected to."""
    wanted, steps = sweep.settings.sweep, sweep.base.schedule.max_iters
    slots_for(sweep.base, wanted.max_concurrent_trials)  # or else nothing is deleted
    if sweep.replaces_another:
        sweep.begin()
    trials = Search(sweep)
    try:
        with TrialTable(f"{trials.count} trials by {wanted.search_algorithm}", steps) as board:
            run_trials(sweep, trials, board, scheduled=wanted.scheduler == "asha")
        if finals := Finals.of(sweep, collect_outcome(sweep)):
            with TrialTable("the settings' own values against the winner", steps) as board:
                run_trials(sweep, finals, board, scored=True)
    finally:
        found = write_outcome(sweep)
    return found


def run_trials(
    sweep: Sweep,
    source: Source,
    board: TrialTable,
    *,
    scheduled: bool = False,
    scored: bool = False,
) -> None:
    """Run all trials of a source to their ends.

    `scheduled`: those that fall behind are stopped; `scored`: on what the search has not seen.
    """
    from ray import tune

    from yuzogpt.orchestration.tune.callbacks import TrialSearcher, Watch
    from yuzogpt.orchestration.tune.trial import trainable

    slots, resources = slots_for(sweep.base, sweep.settings.sweep.max_concurrent_trials)
    slots = min(slots, source.count)
    threads = threads_for(sweep.base, slots)
    suggestions = TrialSearcher(source, scored=scored)
    watch = Watch(board, suggestions.kept)
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
                callbacks=[watch],
            ),
        )
        # It tells of trials that died, at length, and that what it did not write cannot be read.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        tuner.fit()
    watch.settle()


def asha(sweep: Sweep) -> Any:
    """Return ASHA (Li et al., 2020), by optimizer steps."""
    from ray.tune.schedulers import ASHAScheduler

    wanted, steps = sweep.settings.sweep, sweep.base.schedule.max_iters
    grace = wanted.grace_steps or 2 * sweep.base.evaluation.eval_interval
    return ASHAScheduler(
        time_attr=STEP,
        max_t=steps + 1,
        grace_period=min(grace, steps),
        reduction_factor=wanted.reduction_factor,
    )


def slots_for(settings: TrainSettings, wanted: int) -> tuple[int, dict[str, float]]:
    """Return how many trials run at a time, and what each holds while it does.

    Never more than find a place with all of their workers: two that wait for each other's would
    wait for ever.
    """
    import ray

    have = ray.cluster_resources()
    device, workers = settings.device.device, workers_of(settings)
    use_gpu = device == "cuda" or (device == "auto" and have.get("GPU", 0) > 0)
    what = "GPU" if use_gpu else "CPU"
    room = int(have.get(what, 0)) // workers
    if not room:
        raise UserError(
            f"--num_workers={workers}: there are {int(have.get(what, 0))} {what}(s) here, and a "
            "trial wants one for each of its workers"
        )
    slots = min(wanted or room, room)
    if workers > 1:
        return slots, {"CPU": TRACE}
    return slots, {"GPU": 1, "CPU": 1} if use_gpu else {"CPU": 1}


def threads_for(settings: TrainSettings, slots: int) -> int:
    """Return the threads of each worker, so that trials beside each other share a node's cores."""
    nodes = cores_of_nodes() or [1]
    beside = math.ceil(slots * workers_of(settings) / len(nodes))
    # An embedded Ray counts a core for each worker, although there may be fewer.
    cores = available_cores() if is_embedded() else min(nodes)
    return settings.device.threads or threads_asked() or max(1, cores // beside)
