"""One trial, in a process of Ray Tune's: it trains here, or with a TorchTrainer's workers."""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from yuzogpt.config import TrainSettings, with_changes
from yuzogpt.errors import InUse, RunFailed, UserError
from yuzogpt.orchestration.environment import TUNE_STOP_TIMEOUT_S
from yuzogpt.orchestration.tune.source import LOSS, STEP, STOP_TIMEOUT_S
from yuzogpt.runs.event_log import Listener
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.tuning.sweep import Sweep, workers_of
from yuzogpt.tuning.trials import Trial, fail_before_start, run_trial, score_trial

LEASE_TIMEOUT_S = 30.0  # a lease without a heartbeat expires after 10 s
WORKER_CPUS = 0.9  # of each of several workers: the rest is left for the trial's own process


def trainable(sweep: Sweep, threads: int, *, scored: bool) -> Callable[[dict[str, Any]], None]:
    """Return what Tune calls for each trial.

    `threads`: of each worker; `scored`: evaluate, at the end, on data that no search has seen.
    """

    def run(config: dict[str, Any]) -> None:
        trial = Trial.read(Path(config["directory"]))
        if trial is None:
            raise RunFailed(
                f"{config['directory']} is not there on {os.uname().nodename}: choose an --out_dir "
                "on storage that all nodes share"
            )
        os.environ[TUNE_STOP_TIMEOUT_S] = str(STOP_TIMEOUT_S)
        try:
            settings = sweep.trial_settings(trial)
        except UserError as error:
            fail_before_start(trial, str(error), Reports())
            return
        settings = with_changes(settings, {"device.threads": threads})
        continues = run_trial(settings, trial, Reports(), train)
        if scored:
            score_trial(settings, trial.directory, train)
        free_memory()
        if not continues:
            raise SystemExit(0)  # by which Tune knows the end of a trial that it has stopped

    return run


class Reports:
    """Hands the steps and losses of a trial to Tune."""

    def __call__(self, step: int, loss: float) -> bool:
        """Report to Tune; return whether it lets the trial continue."""
        from ray import tune

        try:
            tune.report({STEP: step, LOSS: loss})
        except SystemExit:
            return False
        return True


def train(settings: TrainSettings, listener: Listener) -> str | None:
    """Train, and return why the run stopped before its end, if it did."""
    from yuzogpt import runs
    from yuzogpt.runs.event_log import Follower
    from yuzogpt.training.launch import work_here

    with held(settings) as run:
        if workers_of(settings.workers) == 1:
            return work_here(settings, run, listener)
        from yuzogpt.orchestration.train.trainer import fit

        with Follower(run / runs.METRICS, listener):
            return fit(settings, run, WORKER_CPUS)


@contextlib.contextmanager
def held(settings: TrainSettings) -> Iterator[RunStorage]:
    """Hold the trial's directory; wait for the process of an earlier attempt to end."""
    from yuzogpt import runs

    with contextlib.ExitStack() as stack:
        deadline = time.monotonic() + LEASE_TIMEOUT_S
        while True:
            try:
                run = stack.enter_context(runs.hold_run_dir(settings))
                break
            except InUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        yield run


def free_memory() -> None:
    """Free the memory of a trial: the next one may run in this process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
