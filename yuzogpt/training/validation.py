"""The validation loss of a run: estimates while it trains, the whole split at its end."""

import contextlib
import math
from dataclasses import dataclass

from yuzogpt import checkpoints
from yuzogpt.checkpoints import remote
from yuzogpt.checkpoints.format import MODEL
from yuzogpt.config import TrainSettings
from yuzogpt.data.batches import FixedWindows
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.evaluation.loss import mean_loss
from yuzogpt.model.gpt import GPT
from yuzogpt.runtime.device import Hardware
from yuzogpt.runtime.world import World
from yuzogpt.training.divergence import ADVICE
from yuzogpt.training.guards import weights_are_finite
from yuzogpt.training.hooks import LoopHooks
from yuzogpt.training.parallel import ParallelModel
from yuzogpt.training.step_log import StepLog, finite_or_none


@dataclass(frozen=True)
class Validation:
    """Measures the loss on the val split. Each method raises Interrupted if a rank is to stop."""

    windows: FixedWindows
    settings: TrainSettings
    world: World
    hardware: Hardware
    hooks: LoopHooks

    @property
    def estimate_windows(self) -> int:
        """The number of windows of an estimate; estimates over other numbers do not compare."""
        count = self.settings.evaluation.eval_iters * self.settings.batch.batch_size
        return len(self.windows.spread(count))

    def estimate(self, model: GPT) -> float:
        """Return the loss over eval_iters batches of windows, the same windows each time."""
        return self._loss(model, self.estimate_windows)

    def whole(self, model: GPT) -> float:
        """Return the loss over the whole split: the one that is reported and compared."""
        return self._loss(model, len(self.windows))

    def _loss(self, model: GPT, count: int) -> float:
        indices, batch_size = self.windows.spread(count), self.settings.batch.batch_size
        return mean_loss(
            model, self.windows, indices, batch_size, self.world, self.hardware,
            lambda: self.hooks.heartbeat("the evaluation"), self.hooks.stop.requested_here,
        )  # fmt: skip


def evaluate_best_and_last(model: ParallelModel, validation: Validation, log: StepLog) -> None:
    """Evaluate the last and the best checkpoint over the whole split, and write the results."""
    world, run_dir = validation.world, validation.hooks.run_dir
    step, last_loss = log.step, validation.whole(model.gpt)
    if not (weights_are_finite(model, world) and math.isfinite(last_loss)):
        raise RunFailed(
            f"{validation.settings.run.out_dir}: the weights diverged by the last step, "
            f"{step}: val loss {last_loss}. {ADVICE}"
        )
    best_step, best_loss, best = step, last_loss, None
    with contextlib.suppress(UserError, OSError):  # such as checkpoints of another version
        best = checkpoints.best(run_dir, lambda *_: None) if world.rank == 0 else None
    name = world.broadcast(best.directory.name if best else None)
    if name and name != f"step-{step}":
        best = remote.read_on_all_ranks(run_dir / "checkpoints" / name, world, optimizer=False)
        model.load(best.tensors(MODEL))
        best_step, best_loss = best.state.step, validation.whole(model.gpt)
    losses = {"val_loss": finite_or_none(last_loss), "best_val_loss": finite_or_none(best_loss)}
    log.write("final", best_step=best_step, **losses)
