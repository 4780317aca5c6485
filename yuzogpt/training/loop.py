"""The training loop, from top to bottom, in the order in which it happens.

In: settings, the world, a prepared corpus, and the checkpoint to go on from. Out: checkpoints and
metrics.jsonl in out_dir. Plain PyTorch: who started it (this process, torchrun or Ray Train) shows
only in `world` and `report`.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from yuzogpt import checkpoints, loading
from yuzogpt.checkpoints import Checkpoint, State
from yuzogpt.config import TrainSettings
from yuzogpt.data.batches import FixedWindows, Rows
from yuzogpt.data.blocks import TOKENIZER, PreparedCorpus
from yuzogpt.evaluation.loss import mean_loss
from yuzogpt.hardware import Hardware, choose_hardware
from yuzogpt.metrics import MetricsLog
from yuzogpt.model.dropout import row_keys
from yuzogpt.model.gpt import GPT
from yuzogpt.training.optimizers import build_optimizer, load_state_tensors, state_tensors
from yuzogpt.training.parallel import averaging, parallelize, settle_buckets
from yuzogpt.training.schedules import lr_at
from yuzogpt.world import World

# The seam to the outside: called by every rank, equally often, at checkpoints only, with the
# metrics and the checkpoint's directory.
Report = Callable[[dict[str, float], Path], None]


def train(
    settings: TrainSettings,
    world: World,
    corpus: PreparedCorpus,
    report: Report,
    resume: Checkpoint | None,
    log: MetricsLog | None,
    refuse_to_write: Callable[[], None],
) -> None:
    """Train from `resume`, or from `init_from`, to max_iters.

    `log`: on rank 0 only. `refuse_to_write`: called before a checkpoint, raises if out_dir is
    another's by now.
    """
    schedule, every = settings.schedule, settings.log.log_interval
    seed, global_rows = settings.run.seed, settings.batch.global_rows

    # What is trained on what.
    with world.all_or_none():
        hardware = choose_hardware(settings.device, world, settings.device.compile)
        model = loading.model_for_training(settings, resume).to(hardware.device)
    settings = settings.model_copy(update={"model": model.settings})
    data = Rows(corpus.stream("train"), model.settings.block_size, seed)
    windows = FixedWindows(corpus.stream("val"), model.settings.block_size)
    validation = Validation(windows, settings, world, hardware)
    optimizer = build_optimizer(model, settings.optimizer)
    step, rows_seen = 0, 0
    if resume:
        step, rows_seen = resume.state.step, resume.state.rows_seen
        load_state_tensors(model, optimizer, resume.optimizer())
    trained = parallelize(model, world, hardware, settings.workers)
    if log:
        introduce(log, settings, world, hardware, model, data, step, rows_seen)

    if settings.evaluation.eval_only:
        val_loss = validation.whole(model)
        if log:
            log.write("eval_only", step, val_loss=val_loss)
        return
    if step == 0:
        estimate = validation.estimate(model)
        if log:
            log.write("evaluation", 0, rows_seen=0, val_loss_estimate=estimate)
    first_batch = next(micro_batches(data, settings, world, hardware, rows_seen))
    settle_buckets(trained, hardware, *first_batch)

    started, logged_step = time.perf_counter(), step
    while step < schedule.max_iters:
        lr = lr_at(step, settings.optimizer, schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward, in micro-steps that fit into memory. DDP averages gradients over
        # ranks; the scale turns that into the mean over the global batch, however it is shared.
        scale = world.size / (global_rows * data.block_size)
        loss_sum = torch.zeros((), device=hardware.device)
        batches = micro_batches(data, settings, world, hardware, rows_seen)
        micro_steps = math.ceil(len(world.share(global_rows)) / settings.batch.batch_size)
        for micro_step, (ids, targets, keys) in enumerate(batches, start=1):
            with averaging(trained, last=micro_step == micro_steps):
                with hardware.autocasting():
                    losses = trained(ids, targets, keys)  # (B, T)
                (losses.sum() * scale).backward()
            loss_sum += losses.detach().sum()

        limit = settings.optimizer.grad_clip or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, rows_seen = step + 1, rows_seen + global_rows

        if step % every == 0:
            loss = world.sum(loss_sum).item() / (global_rows * data.block_size)
            if log:
                now = time.perf_counter()
                tokens = (step - logged_step) * global_rows * data.block_size
                log.write(
                    "train",
                    step,
                    rows_seen=rows_seen,
                    loss=loss,
                    lr=lr,
                    grad_norm=grad_norm.item(),
                    tokens_per_second=round(tokens / (now - started), 1),
                    tokens_per_step=global_rows * data.block_size,
                )
                started, logged_step = now, step

        if step % settings.evaluation.eval_interval == 0 or step == schedule.max_iters:
            before = time.perf_counter()
            estimate = validation.estimate(model)
            metrics = {"val_loss_estimate": estimate, "val_windows": validation.estimate_windows}
            if log:
                log.write("evaluation", step, rows_seen=rows_seen, val_loss_estimate=estimate)
                state = State(
                    step=step,
                    rows_seen=rows_seen,
                    settings=settings.model_dump(),
                    dataset=corpus.fingerprint,
                    tokenizer=corpus.manifest.tokenizer["fingerprint"],
                    metrics=metrics,
                )
                refuse_to_write()
                save(settings, state, model, optimizer, corpus)
            report(metrics, run_directory(settings) / "checkpoints" / f"step-{step}")
            started += time.perf_counter() - before

    finish(settings, world, model, validation, log, step)


def micro_batches(
    data: Rows, settings: TrainSettings, world: World, hardware: Hardware, rows_seen: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's share of the next global batch: ids (B, T), targets (B, T), keys (B,)."""
    share = world.share(settings.batch.global_rows)
    for first in range(share.start, share.stop, settings.batch.batch_size):
        count = min(settings.batch.batch_size, share.stop - first)
        rows = torch.from_numpy(data.rows(rows_seen + first, count))
        keys = row_keys(settings.run.seed, rows_seen + first, count)
        rows, keys = hardware.send(rows), hardware.send(keys)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), keys


@dataclass(frozen=True)
class Validation:
    """The val split of a run: looked at quickly on the way, wholly at the end."""

    windows: FixedWindows
    settings: TrainSettings
    world: World
    hardware: Hardware

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
        return mean_loss(model, self.windows, indices, batch_size, self.world, self.hardware)


def save(
    settings: TrainSettings,
    state: State,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    corpus: PreparedCorpus,
) -> None:
    """Write a checkpoint, then delete all others but the best."""
    run = run_directory(settings)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    moments = state_tensors(model, optimizer)
    tokenizer = (corpus.directory / TOKENIZER).read_bytes()
    checkpoints.prune(run, checkpoints.write(run, state, weights, moments, tokenizer))


def finish(
    settings: TrainSettings,
    world: World,
    model: GPT,
    validation: Validation,
    log: MetricsLog | None,
    step: int,
) -> None:
    """Evaluate the last and the best checkpoint over the whole split, and say so."""
    best_step, best_loss = step, validation.whole(model)
    last_loss = best_loss
    found = checkpoints.best(run_directory(settings), lambda *_: None) if log else None
    place = world.from_rank_0(str(found.directory) if found else None)
    if place and checkpoints.step_of(Path(place)) != step:
        best = checkpoints.read(Path(place))
        model.load_state_dict(best.model())
        best_step, best_loss = best.state.step, validation.whole(model)
    if log:
        log.write("final", step, val_loss=last_loss, best_step=best_step, best_val_loss=best_loss)


def introduce(
    log: MetricsLog,
    settings: TrainSettings,
    world: World,
    hardware: Hardware,
    model: GPT,
    data: Rows,
    step: int,
    rows_seen: int,
) -> None:
    """Say what is about to happen, before it does."""
    batch, shape = settings.batch, model.settings
    tokens = batch.global_rows * shape.block_size
    epoch, _ = data.locate(rows_seen)
    lines = [
        f"model: {model.num_parameters() / 1e6:.2f}M parameters, {shape.n_layer} layers, "
        f"{shape.n_embd} wide, context {shape.block_size}",
        f"batch: {batch.global_rows} rows x {shape.block_size} = {tokens:,} tokens a step",
        f"data: epoch {epoch + 1} has {data.windows(epoch):,} rows; "
        f"its phase leaves {data.dropped(epoch):,} of {len(data.stream):,} tokens out",
        f"{world.size} worker(s) x {hardware.threads} thread(s) on {hardware.device.type}; "
        + "; ".join(hardware.reasons),
    ]
    lines.append(f"resuming at step {step}" if step else f"weights: {settings.run.init_from}")
    for line in lines:
        log.write("notice", step, text=line)


def run_directory(settings: TrainSettings) -> Path:
    """Return out_dir, which the launcher has made absolute."""
    return Path(settings.run.out_dir)
