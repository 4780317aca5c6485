"""What Ray Tune asks and tells while a sweep runs; in the process of the command.

In: where trials come from, and a board. Out: Tune's trials, and what becomes of ours.
"""

import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.search import Searcher

from yuzogpt.errors import RunFailed, UserError
from yuzogpt.orchestration.causes import cause_of
from yuzogpt.orchestration.tune.placement import give_back
from yuzogpt.orchestration.tune.source import ENDS_WITHIN, LOSS, STEP, Source
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.tuning.sweep import Result
from yuzogpt.tuning.table import Row, TrialTable
from yuzogpt.tuning.trials import State, Trial, conclude


class SkipPickling:
    """Tune pickles all that it is given, for a reader that never comes."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave it empty."""
        return {}


class TrialSearcher(SkipPickling, Searcher):  # type: ignore[misc]
    """Gives our trials to Tune."""

    def __init__(self, source: Source, *, scored: bool) -> None:
        """No trial is given out yet. `scored`: one without its score is not over."""
        super().__init__(metric=LOSS, mode="min")
        self.source, self.scored = source, scored
        self.kept: set[Path] = set()  # of trials that were over before this command
        self.given: dict[str, Path] = {}  # by Tune's names

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's configuration."""
        trial = self.source.ask()
        if trial is None:
            return Searcher.FINISHED
        self.given[trial_id] = trial.directory
        wants_score = self.scored and trial.state == "finished" and trial.score is None
        if trial.is_done and not wants_score:
            self.kept.add(trial.directory)
        return {"directory": str(trial.directory)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Let the source learn from how a trial ended."""
        trial = read_ours(self.given[trial_id])
        loss = Result.of(trial).best[0]
        is_sound = trial.state != "failed" and not error and math.isfinite(loss)
        self.source.tell(trial.name, loss if is_sound else None)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Keep nothing: the sweep's directory has it all."""

    def save(self, checkpoint_path: str) -> None:
        """The same."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: Tune's state is not read again."""
        raise NotImplementedError


class Watch(SkipPickling, Callback):  # type: ignore[misc]
    """Tells the board of trials, and writes down the ends that they could not write themselves."""

    def __init__(self, board: TrialTable, kept: Collection[Path]) -> None:
        """`board`: what a person sees; `kept`: trials that were over before this command."""
        self.board, self.kept = board, kept
        self.ended: dict[Path, tuple[State, str]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A process has begun with a trial."""
        ours = read(trial)
        if ours.directory in self.kept:
            steps = [step for step, _ in ours.evaluations()]
            loss = Result.of(ours).best[0]
            self.board.mark_kept(
                ours.name, Row(ours.values, ours.state, max(steps, default=0), loss, ours.error)
            )
        else:
            self.board.mark_started(ours.name, ours.values)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """A trial was evaluated."""
        if STEP in result:
            self.board.update(read(trial).name, result[STEP], result[LOSS])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial has ended, or the scheduler has stopped it, which then takes a moment."""
        ours = read(trial)
        row = self.board.rows.get(ours.name)
        made_all = row is not None and row.step >= self.board.max_iters
        state: State = "finished" if made_all else "stopped"
        self._end(ours, ours.state if ours.is_done else state, ours.error)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial's process has died; another one goes on."""
        give_back(read(trial).directory)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial's process has died too often."""
        give_back(read(trial).directory)
        why = cause_of(trial.get_pickled_error() or RunFailed("its process died"))
        self._end(read(trial), "failed", f"{why}; tried {trial.num_failures} times")

    def _end(self, ours: Trial, state: State, error: str) -> None:
        self.ended[ours.directory] = (state, error)
        if ours.directory not in self.kept:
            self.board.mark_ended(ours.name, state, error)

    def settle(self) -> None:
        """Conclude trials whose process was gone before it could; wait for one that still does."""
        deadline = time.monotonic() + ENDS_WITHIN
        for directory, (state, error) in self.ended.items():
            while time.monotonic() < deadline and not read_ours(directory).is_done:
                try:
                    with Lease(LocalStorage(directory)):
                        conclude(read_ours(directory), state, error)
                except UserError:  # its process lives
                    time.sleep(0.2)
            give_back(directory)  # Tune ends a stopped trial's process in the middle of its end


def read(trial: Any) -> Trial:
    """Return our trial for Tune's."""
    return read_ours(Path(trial.config["directory"]))


def read_ours(directory: Path) -> Trial:
    """Return the trial that the source has written there."""
    found = Trial.read(directory)
    assert found
    return found
