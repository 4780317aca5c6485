"""The training loop, from top to bottom, in the order in which it happens.

In: settings, the world, a prepared corpus, and the checkpoint to go on from. Out: checkpoints and
metrics.jsonl in out_dir. Plain PyTorch: who started it (this process, torchrun or Ray Train) shows
only in `world` and `outside`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from yuzogpt import checkpoints
from yuzogpt.checkpoints import load, remote
from yuzogpt.checkpoints.format import MODEL, OPTIMIZER, Checkpoint, State
from yuzogpt.checkpoints.load import Start
from yuzogpt.config import TrainSettings
from yuzogpt.data.batches import FixedWindows, Rows
from yuzogpt.data.blocks import TOKENIZER, PreparedCorpus
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.evaluation.loss import Interrupted, mean_loss
from yuzogpt.model.dropout import row_keys
from yuzogpt.model.gpt import GPT
from yuzogpt.runs.event_log import MetricsLog
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.device import Hardware, choose_hardware
from yuzogpt.runtime.network import measure
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.training.batch_size import GlobalBatch
from yuzogpt.training.checkpointer import AsyncCheckpointer
from yuzogpt.training.guards import (
    Guard,
    Health,
    StepStats,
    clip,
    not_finite_layers,
    reduce_step_stats,
    squares_of_gradients,
    weights_are_finite,
)
from yuzogpt.training.hooks import LoopHooks
from yuzogpt.training.optimizers import build_optimizer, load_state_tensors
from yuzogpt.training.parallel import ParallelModel, choose_kind, parallelize, warm_up_ddp_buckets
from yuzogpt.training.schedules import batch_factor, lr_at
from yuzogpt.training.step_log import StepLog, finite

WAYS_OUT = (
    "Try a lower --learning_rate, more --warmup_iters, or --dtype=float32, in another --out_dir"
)
LONG_STEP = 5.0  # seconds; a longer one is not waited for when the run is asked to stop


def train(
    settings: TrainSettings,
    world: World,
    corpus: PreparedCorpus,
    resume: Checkpoint | None,
    start: Start | None,
    begin: Callable[[], MetricsLog | None],
    outside: LoopHooks,
) -> str | None:
    """Train from `resume`, or from `start`, to max_iters; return why it stopped before, if so.

    `begin`: called once every rank has its weights, before anything is written; it returns the log
    on rank 0. RunFailed if the run cannot go on.
    """
    schedule, run = settings.schedule, outside.run
    seed = settings.run.seed

    def moves(place: str) -> None:  # in the loop's own thread alone
        outside.watchdog.moves(place)
        outside.stop.look()

    # What is trained on what.
    with world.raise_on_all_ranks():
        hardware = choose_hardware(settings.device, world, settings.device.compile)
        weights = load.starting_weights(settings, resume, start)
    shape = settings.model
    kind, why = choose_kind(settings.parallel, world, hardware.device, shape)
    trainee = parallelize(
        shape, weights, kind, settings.parallel, hardware, settings.finetuning.freeze_layers
    )
    model = trainee.model
    optimizer = build_optimizer(model, settings.optimizer, settings.finetuning, hardware.autocast)
    guard = Guard.remembering(settings.guard, resume.state.guard if resume else {})
    batch = GlobalBatch.remembering(settings.batch, resume.state.batch if resume else {})
    step, rows_seen = 0, 0
    if resume:
        step, rows_seen = resume.state.step, resume.state.rows_seen
        load_state_tensors(model, optimizer, resume.tensors(OPTIMIZER))
    data = Rows(corpus.stream("train"), shape.block_size, seed)
    windows = FixedWindows(corpus.stream("val"), shape.block_size, settings.evaluation.val_part)
    validation = Validation(windows, settings, world, hardware, moves, outside.stop)
    log = begin()
    records = StepLog(log, settings, step)
    records.log_run_header(world, hardware, model, data, rows_seen, why, start)

    if settings.evaluation.eval_only:
        try:
            records.write("eval_only", val_loss=finite(validation.whole(model)))
        except Interrupted:
            return asked_to_stop(outside.stop, world)
        return None
    tokenizer = (corpus.directory / TOKENIZER).read_bytes()
    saver = AsyncCheckpointer(
        settings.checkpoint, world, trainee, optimizer, tokenizer, log, outside, resume
    )
    records.start(world, kind, start)

    def evaluate() -> dict[str, float]:  # nothing, if the run is asked to stop meanwhile
        try:
            estimate = validation.estimate(model)
        except Interrupted:
            return {}
        records.evaluation(rows_seen, estimate)
        return {"val_loss_estimate": estimate, "val_windows": validation.estimate_windows}

    def is_evaluated_after(step: int) -> bool:
        return step == schedule.max_iters or is_due(step, settings.evaluation.eval_interval)

    metrics: dict[str, float] = {}  # of the weights as they are
    reason: str | None = None
    if resume is None:
        reason = None if evaluate() else asked_to_stop(outside.stop, world)
    elif is_evaluated_after(step) and "val_loss_estimate" not in resume.state.metrics:
        if metrics := evaluate():  # the run was stopped before it could
            saver.add_metrics(step, metrics)
        else:
            reason = asked_to_stop(outside.stop, world)
    if reason:
        records.stop(reason)
        return reason
    first_rows, most = batch.rows_at(step), batch.most_in_pass(step, world)
    first_batch = next(micro_batches(data, rows_seen, first_rows, most, world, hardware))
    warm_up_ddp_buckets(trainee.trained, hardware, *first_batch)

    def save(metrics: dict[str, float], *, is_evaluated_next: bool = False) -> None:
        saver.save(
            State(
                step=step,
                rows_seen=rows_seen,
                settings=settings.model_dump(),
                dataset=corpus.fingerprint,
                tokenizer=corpus.manifest.tokenizer["fingerprint"],
                metrics=metrics,
                guard=guard.memory(),
                batch=batch.memory(),
            ),
            is_evaluated_next=is_evaluated_next,
        )

    if world.size > 1 and settings.log.network_interval:  # also makes NCCL's connections in time
        records.network(measure(world, hardware.device))
    saver.wait()  # for its memory: better none here than none at the first checkpoint
    outside.watchdog.begin_first_step()
    records.clock()
    seconds, is_long = 0.0, False
    while step < schedule.max_iters and reason is None:
        rows, most = batch.rows_at(step), batch.most_in_pass(step, world)
        lr = lr_at(step, settings.optimizer, schedule) * batch_factor(rows, settings.batch)
        optimizer.set_learning_rate(lr)

        # Forward and backward, in micro-steps that fit into memory. Gradients are averaged over
        # ranks; the scale turns that into the mean over the global batch, however it is shared.
        began, tokens = time.perf_counter(), rows * data.block_size
        loss_sum, part_square = torch.zeros((), device=hardware.device), None
        micro_steps = len(world.batches(rows, most))
        batches = micro_batches(data, rows_seen, rows, most, world, hardware)
        for micro_step, (ids, targets, keys) in enumerate(batches, start=1):
            with trainee.averaging(last=micro_step == micro_steps):
                with hardware.autocasting():
                    losses = trainee.trained(ids, targets, keys)  # (B, T)
                (losses.sum() * (world.size / tokens)).backward()
            loss_sum += losses.detach().sum()
            if micro_step == 1 and batch.is_measured_at(step, world):
                part_square = squares_of_gradients(trainee).sum()
            moves(f"step {step + 1}")
            if is_long and (reason := asked_to_stop(outside.stop, world)):
                break
        if reason:  # in the middle of a long step, which is done again
            save(metrics)
            break

        # Is the step fit to be taken? All ranks come to the same answer.
        is_asked = outside.stop.look() is not None
        totals = reduce_step_stats(trainee, loss_sum, tokens, is_asked, seconds, world, part_square)
        seconds = time.perf_counter() - began
        is_long = totals.seconds > LONG_STEP
        expected, verdict = guard.mean, guard.judge(totals)
        is_clipped, health = False, None
        if is_taken := guard.takes(verdict):
            if is_due(step + 1, settings.log.health_interval):
                health = Health(trainee)
            is_clipped = clip(trainee, totals.gradient_norm, settings.optimizer.grad_clip)
            optimizer.step()
        optimizer.zero_grad()
        if part_square is not None:
            before = batch.rows
            update_noise_scale(batch, totals, most, trainee, world)
            records.batch(before, batch)
        step, rows_seen = step + 1, rows_seen + rows
        records.after_step(
            rows_seen, lr, totals, verdict, tokens=tokens, taken=is_taken, clipped=is_clipped,
            expected=expected,
        )  # fmt: skip
        if health:
            records.write("health", layers=health.layers(totals, world))
        if world.size > 1 and is_due(step, settings.log.network_interval):
            with records.pause_clock():
                network = measure(world, hardware.device)
            records.network(network)
        if guard.gives_up():
            saver.wait()
            raise RunFailed(divergence_message(settings, trainee, totals, guard, step))
        outside.watchdog.end_start_up()

        # Write a checkpoint, and look at the validation loss, when it is time for them.
        is_last = step == schedule.max_iters
        if totals.stopping and not is_last:
            reason = asked_to_stop(outside.stop, world)
        metrics = {}
        is_evaluated = is_evaluated_after(step) and not reason
        if is_evaluated or reason or is_due(step, settings.checkpoint.checkpoint_interval):
            # Weights that may be spoilt push no good ones out.
            is_spoilt = guard.not_finite_in_a_row > 0 and not is_last
            if reason or not (is_spoilt or not weights_are_finite(trainee, world)):
                save(metrics, is_evaluated_next=is_evaluated)
        if is_evaluated:
            with records.pause_clock():
                metrics = evaluate()
            if metrics:
                saver.add_metrics(step, metrics)
            else:
                reason = asked_to_stop(outside.stop, world)

    saver.finish()
    outside.watchdog.allow_long_reads()
    if not reason:
        try:
            finish(run, world, trainee, validation, records)
        except Interrupted:
            reason = asked_to_stop(outside.stop, world)
    if reason:
        records.stop(reason)
    return reason


def asked_to_stop(stop: StopRequest, world: World) -> str | None:
    """Return why any rank was asked to stop, on every rank; the first rank's reason counts."""
    return next((reason for reason in world.gather(stop.look()) if reason), None)


def is_due(step: int, interval: int) -> bool:
    """Tell whether what happens every `interval` steps (0: never) happens after `step`."""
    return interval > 0 and step % interval == 0


def micro_batches(
    data: Rows, rows_seen: int, count: int, most: int, world: World, hardware: Hardware
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's share of a global batch: ids (B, T), targets (B, T), keys (B,).

    The batch is the next `count` rows, at most `most` of them at a time.
    """
    for batch in world.batches(count, most):
        rows = torch.from_numpy(data.rows(rows_seen + batch.start, len(batch)))
        keys = row_keys(data.seed, rows_seen + batch.start, len(batch))
        rows, keys = hardware.send(rows), hardware.send(keys)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), keys


def update_noise_scale(
    batch: GlobalBatch, totals: StepStats, most: int, trainee: ParallelModel, world: World
) -> None:
    """Tell the batch's schedule how much a part's gradient differs from the whole one."""
    of_rank = min(most, batch.rows // world.size)  # rows of a first pass
    part = of_rank * (world.size if trainee.kind == "fsdp" else 1)
    # The gradient of a part is divided by the rows of all, and DDP averages over ranks.
    scale = batch.rows / (world.size * of_rank)
    batch.measure(part, totals.part_square * scale**2, totals.gradient_norm**2)


@dataclass(frozen=True)
class Validation:
    """The val split of a run: looked at quickly on the way, wholly at the end."""

    windows: FixedWindows
    settings: TrainSettings
    world: World
    hardware: Hardware
    on_progress: Callable[[str], None]
    stop: StopRequest

    @property
    def estimate_windows(self) -> int:
        """Over how many windows the estimate is: only equal counts compare."""
        count = self.settings.evaluation.eval_iters * self.settings.batch.batch_size
        return len(self.windows.spread(count))

    def whole(self, model: GPT) -> float:
        """Return the loss over the whole split: the one that is reported and compared."""
        return self._loss(model, len(self.windows))

    def estimate(self, model: GPT) -> float:
        """Return the loss over eval_iters batches of windows, the same ones each time."""
        return self._loss(model, self.estimate_windows)

    def _loss(self, model: GPT, count: int) -> float:
        indices, batch_size = self.windows.spread(count), self.settings.batch.batch_size
        return mean_loss(
            model, self.windows, indices, batch_size, self.world, self.hardware,
            lambda: self.on_progress("the evaluation"), lambda: self.stop.look() is not None,
        )  # fmt: skip


def divergence_message(
    settings: TrainSettings, trainee: ParallelModel, totals: StepStats, guard: Guard, step: int
) -> str:
    """Return one line for the user about a run whose steps are not fit to be taken any more."""
    layers = not_finite_layers(trainee, totals)
    where = f", not finite in {', '.join(layers[:3])}" if layers else ""
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return (
        f"{settings.run.out_dir}: step {step} is number {guard.not_finite_in_a_row} in a row to be "
        f"skipped: loss {totals.loss}, gradient norm {totals.gradient_norm}{where}{more}; weights "
        f"are those of step {step - guard.not_finite_in_a_row}. {WAYS_OUT}"
    )


def finish(
    run: RunStorage, world: World, trainee: ParallelModel, validation: Validation, records: StepLog
) -> None:
    """Evaluate the last and the best checkpoint over the whole split, and say so."""
    step, last_loss = records.step, validation.whole(trainee.model)
    if not (weights_are_finite(trainee, world) and math.isfinite(last_loss)):
        raise RunFailed(
            f"{validation.settings.run.out_dir}: the weights are spoilt after the last step, "
            f"{step}: val loss {last_loss}. {WAYS_OUT}"
        )
    best_step, best_loss = step, last_loss
    found = None
    with contextlib.suppress(UserError, OSError):  # of another version, say
        found = checkpoints.best(run, lambda *_: None) if world.rank == 0 else None
    name = world.broadcast(found.directory.name if found else None)
    if name and name != f"step-{step}":
        best = remote.read_on_all_ranks(run / "checkpoints" / name, world, optimizer=False)
        trainee.load(best.tensors(MODEL))
        best_step, best_loss = best.state.step, validation.whole(trainee.model)
    losses = {"val_loss": finite(last_loss), "best_val_loss": finite(best_loss)}
    records.write("final", best_step=best_step, **losses)
