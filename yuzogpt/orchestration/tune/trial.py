"""One trial, in a process of Ray Tune's: it trains here, or with a TorchTrainer's workers.

In: the trial's directory, as the sweep made it. Out: reports to Tune, and the trial's run.
"""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from yuzogpt.config import TrainSettings, with_changes
from yuzogpt.errors import InUse, RunFailed, UserError
from yuzogpt.orchestration.tune.source import ENDS_WITHIN, LOSS, STEP
from yuzogpt.runs.event_log import Listener
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.tuning.sweep import Sweep, workers_of
from yuzogpt.tuning.trials import Trial, fail_before_start, run_trial, score_trial

HELD_WITHIN = 30.0  # seconds; a lease without a heartbeat expires after 10
WORKER_CPUS = 0.9  # of each of several workers: the rest is left for the trial's own process


def trainable(sweep: Sweep, threads: int, *, scored: bool) -> Callable[[dict[str, Any]], None]:
    """Return what Tune calls for each trial.

    `threads`: of each worker; `scored`: to look, at the end, at what no search has seen.
    """

    def run(config: dict[str, Any]) -> None:
        trial = Trial.read(Path(config["directory"]))
        if trial is None:
            raise RunFailed(
                f"{config['directory']} is not there on {os.uname().nodename}: choose an --out_dir "
                "on storage that all nodes share"
            )
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(ENDS_WITHIN)
        try:
            settings = sweep.trial_settings(trial)
        except UserError as error:
            fail_before_start(trial, str(error), Reports())
            return
        settings = with_changes(settings, {"device.threads": threads})
        goes_on = run_trial(settings, trial, Reports(), train)
        if scored:
            score_trial(settings, trial.directory, train)
        make_room()
        if not goes_on:
            raise SystemExit(0)  # what Tune takes for the end of a trial that it has stopped

    return run


class Reports:
    """Hands the steps and losses of a trial to Tune."""

    def __call__(self, step: int, loss: float) -> bool:
        """Wait for Tune's decision; tell whether the trial is to go on."""
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
        if workers_of(settings) == 1:
            return work_here(settings, run, listener)
        from yuzogpt.orchestration.train.trainer import fit

        with Follower(run / runs.METRICS, listener):
            return fit(settings, run, WORKER_CPUS)


@contextlib.contextmanager
def held(settings: TrainSettings) -> Iterator[RunStorage]:
    """Hold the trial's directory; wait for a process of an earlier attempt that is about to go."""
    from yuzogpt import runs

    with contextlib.ExitStack() as stack:
        deadline = time.monotonic() + HELD_WITHIN
        while True:
            try:
                run = stack.enter_context(runs.hold_run_dir(settings))
                break
            except InUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        yield run


def make_room() -> None:
    """Give back the memory of a trial: the next one may come in this process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
