"""Ray Tune's searcher and callbacks of a sweep; they run in the command's process."""

import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.search import Searcher

from yuzogpt.errors import RunFailed, UserError
from yuzogpt.orchestration.causes import cause_of
from yuzogpt.orchestration.tune.placement import remove_placement_group_of
from yuzogpt.orchestration.tune.source import LOSS, STEP, STOP_TIMEOUT_S, Source
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.tuning.sweep import Result
from yuzogpt.tuning.table import Row, TrialTable
from yuzogpt.tuning.trials import State, Trial, conclude


class SkipPickling:
    """Tune pickles its searcher and callbacks, and nothing reads that again."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TrialSearcher(SkipPickling, Searcher):  # type: ignore[misc]
    """Gives our trials to Tune."""

    def __init__(self, source: Source, *, scored: bool) -> None:
        """`scored`: a trial without its score is not done."""
        super().__init__(metric=LOSS, mode="min")
        self.source, self.scored = source, scored
        self.kept: set[Path] = set()  # of trials that were done before this command
        self.directories: dict[str, Path] = {}  # by Tune's names

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's configuration."""
        trial = self.source.ask()
        if trial is None:
            return Searcher.FINISHED
        self.directories[trial_id] = trial.directory
        wants_score = self.scored and trial.state == "finished" and trial.score is None
        if trial.is_done and not wants_score:
            self.kept.add(trial.directory)
        return {"directory": str(trial.directory)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Let the source learn from how a trial ended."""
        trial = read_trial(self.directories[trial_id])
        loss = Result.of(trial).best[0]
        is_sound = trial.state != "failed" and not error and math.isfinite(loss)
        self.source.tell(trial.name, loss if is_sound else None)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Keep nothing: the sweep's directory has it all."""

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: Tune's state is not read again."""
        raise NotImplementedError


class TableCallback(SkipPickling, Callback):  # type: ignore[misc]
    """Updates the table of trials, and records the ends that trials could not record themselves."""

    def __init__(self, table: TrialTable, kept: Collection[Path]) -> None:
        """`kept`: trials that were done before this command."""
        self.table, self.kept = table, kept
        self.ended: dict[Path, tuple[State, str]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        ours = trial_of(trial)
        if ours.directory in self.kept:
            steps = [step for step, _ in ours.evaluations()]
            loss = Result.of(ours).best[0]
            self.table.mark_kept(
                ours.name, Row(ours.values, ours.state, max(steps, default=0), loss, ours.error)
            )
        else:
            self.table.mark_started(ours.name, ours.values)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """Show a trial's evaluation."""
        if STEP in result:
            self.table.update(trial_of(trial).name, result[STEP], result[LOSS])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Note that a trial has ended, or is ending because the scheduler stopped it."""
        ours = trial_of(trial)
        row = self.table.rows.get(ours.name)
        made_all = row is not None and row.step >= self.table.max_iters
        state: State = "finished" if made_all else "stopped"
        self._end(ours, ours.state if ours.is_done else state, ours.error)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Free the room of a trial whose process died; another process continues it."""
        remove_placement_group_of(trial_of(trial).directory)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Note that a trial's process has died too often."""
        remove_placement_group_of(trial_of(trial).directory)
        reason = cause_of(trial.get_pickled_error() or RunFailed("its process died"))
        self._end(trial_of(trial), "failed", f"{reason}; tried {trial.num_failures} times")

    def _end(self, ours: Trial, state: State, error: str) -> None:
        self.ended[ours.directory] = (state, error)
        if ours.directory not in self.kept:
            self.table.mark_ended(ours.name, state, error)

    def settle(self) -> None:
        """Conclude trials whose process could not; wait for processes that still do."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for directory, (state, error) in self.ended.items():
            while time.monotonic() < deadline and not read_trial(directory).is_done:
                try:
                    with Lease(LocalStorage(directory)):
                        conclude(read_trial(directory), state, error)
                except UserError:  # its process is alive
                    time.sleep(0.2)
            remove_placement_group_of(
                directory
            )  # Tune may kill a stopped trial's process while it ends


def trial_of(trial: Any) -> Trial:
    """Return our trial of Tune's."""
    return read_trial(Path(trial.config["directory"]))


def read_trial(directory: Path) -> Trial:
    """Return the trial that the source has written there."""
    trial = Trial.read(directory)
    assert trial
    return trial
