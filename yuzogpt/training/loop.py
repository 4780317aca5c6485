"""The training loop: what a step does, in the order in which it happens.

Plain PyTorch. Only `world` and `hooks` know whether one process, torchrun or Ray Train runs it.
A run's state is the weights, the optimizer's state, the statistics of the guard and of the batch
schedule, the arithmetic, and two integers, `step` and `rows_seen`; a checkpoint holds all of them.
Data order and dropout masks are pure functions of `rows_seen` and the settings; the learning rate
is one of `step`, the settings and the batch's number of rows. So a resumed run computes the same
numbers as an uninterrupted one: on CPUs bit for bit, with as many workers, threads and
micro-batches as before (others change the order of sums, and so the last bits).

A step is one update of the weights, from one global batch. It consists of micro-steps, each a
forward and a backward pass over a micro-batch that fits into memory.

How a checkpoint is written: training/checkpointer.py.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from yuzogpt.checkpoints import load
from yuzogpt.checkpoints.format import OPTIMIZER, Arithmetic, Checkpoint, State
from yuzogpt.checkpoints.load import Start
from yuzogpt.config import TrainSettings
from yuzogpt.data.batches import FixedWindows, Rows
from yuzogpt.data.blocks import TOKENIZER, PreparedCorpus
from yuzogpt.errors import RunFailed
from yuzogpt.evaluation.loss import Interrupted
from yuzogpt.model.dropout import row_keys
from yuzogpt.runs.event_log import MetricsLog
from yuzogpt.runtime import network
from yuzogpt.runtime.device import Hardware, choose_hardware
from yuzogpt.runtime.world import World
from yuzogpt.training.arithmetic import choose_arithmetic
from yuzogpt.training.batch_size import GlobalBatch, update_noise_scale
from yuzogpt.training.checkpointer import AsyncCheckpointer
from yuzogpt.training.divergence import divergence_message
from yuzogpt.training.guards import (
    Guard,
    clip_grad_norm,
    reduce_step_stats,
    squared_grad_norms,
    weights_are_finite,
)
from yuzogpt.training.hooks import LoopHooks
from yuzogpt.training.layer_stats import LayerStats
from yuzogpt.training.optimizers import Optimizer, build_optimizer, load_state_tensors
from yuzogpt.training.parallel import ParallelModel, choose_kind, parallelize, warm_up_ddp_buckets
from yuzogpt.training.schedules import batch_lr_scale, lr_at
from yuzogpt.training.step_log import StepLog, finite_or_none
from yuzogpt.training.validation import Validation, evaluate_best_and_last

LONG_STEP_S = 5.0  # if steps take longer, a stop request takes effect within a step


def train(
    settings: TrainSettings,
    world: World,
    corpus: PreparedCorpus,
    resume: Checkpoint | None,
    start: Start | None,
    open_log: Callable[[], MetricsLog | None],
    hooks: LoopHooks,
) -> str | None:
    """Train from `resume` or `start` to max_iters; return why the run stopped early, if it did.

    `start`: pretrained weights. `open_log`: returns the log on rank 0. It is called once every rank
    has its weights, before anything is written. Raises RunFailed if the run cannot continue.
    """
    trainer = build_trainer(settings, world, corpus, resume, start, open_log, hooks)
    if settings.evaluation.eval_only:
        return trainer.evaluate_only()
    trainer.prepare_checkpoints(resume)
    trainer.log.log_start(world, trainer.model.kind, start)
    stop_reason = trainer.evaluate_at_start(resume)
    if not stop_reason:
        trainer.prepare_first_step()
        stop_reason = trainer.train_steps()
    trainer.checkpointer.finish()
    if not stop_reason:
        hooks.watchdog.allow_long_reads()
        stop_reason = trainer.evaluate_at_end()
    if stop_reason:
        trainer.log.log_stop(stop_reason, trainer.checkpointer.step)
    return stop_reason


def build_trainer(
    settings: TrainSettings,
    world: World,
    corpus: PreparedCorpus,
    resume: Checkpoint | None,
    start: Start | None,
    open_log: Callable[[], MetricsLog | None],
    hooks: LoopHooks,
) -> "Trainer":
    """Build the model, the optimizer and the data, and restore their state from `resume`."""
    with world.raise_on_all_ranks():
        hardware = choose_hardware(settings.device, world, settings.device.compile)
        weights = load.starting_weights(settings, resume, start)
    hardware, arithmetic, arithmetic_line = choose_arithmetic(settings, world, hardware, resume)
    shape = settings.model
    kind, parallel_reason = choose_kind(settings.parallel, world, hardware.device, shape)
    model = parallelize(
        shape, weights, kind, settings.parallel, hardware, settings.finetuning.freeze_layers
    )
    if arithmetic:
        model.gpt.set_explicit_attention(arithmetic.attention == "explicit")
    optimizer = build_optimizer(
        model.gpt, settings.optimizer, settings.finetuning, hardware.autocast_dtype
    )
    guard = Guard.from_state(settings.guard, resume.state.guard if resume else {})
    batch = GlobalBatch.from_state(settings.batch, resume.state.batch if resume else {})
    step, rows_seen = (resume.state.step, resume.state.rows_seen) if resume else (0, 0)
    if resume:
        load_state_tensors(model.gpt, optimizer, resume.tensors(OPTIMIZER))
    data = Rows(corpus.stream("train"), shape.block_size, settings.run.seed)
    windows = FixedWindows(corpus.stream("val"), shape.block_size, settings.evaluation.val_part)
    validation = Validation(windows, settings, world, hardware, hooks)
    log = StepLog(open_log(), settings, step)
    log.log_run_header(world, hardware, model.gpt, data, rows_seen, parallel_reason, start)
    if arithmetic_line:
        log.write("notice", text=arithmetic_line)
    return Trainer(
        settings, world, hardware, arithmetic, corpus, data, model, optimizer, guard, batch,
        validation, log, hooks, step=step, rows_seen=rows_seen,
    )  # fmt: skip


@dataclass
class Trainer:
    """The parts of one run, on one rank, and its position."""

    settings: TrainSettings
    world: World
    hardware: Hardware
    arithmetic: Arithmetic | None
    corpus: PreparedCorpus
    data: Rows
    model: ParallelModel
    optimizer: Optimizer
    guard: Guard
    batch: GlobalBatch
    validation: Validation
    log: StepLog
    hooks: LoopHooks
    step: int  # steps made
    rows_seen: int  # rows of the data that these steps used
    metrics: dict[str, float] = field(default_factory=dict)  # of the current weights, if evaluated
    checkpointer: AsyncCheckpointer = field(init=False)

    def train_steps(self) -> str | None:
        """Make steps up to max_iters; return the reason if the run is asked to stop before."""
        settings, world, hardware, hooks = self.settings, self.world, self.hardware, self.hooks
        model, optimizer, guard, batch = self.model, self.optimizer, self.guard, self.batch
        schedule, stop, log = settings.schedule, self.hooks.stop, self.log
        stop_reason: str | None = None
        # Duration of the previous step on this rank; whether the mean over ranks was LONG_STEP_S.
        seconds, is_long_step = 0.0, False
        while self.step < schedule.max_iters and stop_reason is None:
            batch_rows = batch.rows_at(self.step)
            max_rows = batch.max_rows_per_micro_step(self.step, world)
            lr = lr_at(self.step, settings.optimizer, schedule)
            lr *= batch_lr_scale(batch_rows, settings.batch)
            optimizer.set_lr(lr)

            # Forward and backward. DDP and FSDP average gradients over ranks; `scale` turns that
            # into the mean over the global batch, however many rows each rank has.
            started, tokens = time.perf_counter(), batch_rows * self.data.block_size
            scale, micro_steps = world.size / tokens, len(world.row_ranges(batch_rows, max_rows))
            loss_sum, micro_grad_sq_norm = torch.zeros((), device=hardware.device), None
            micro_batches = self.micro_batches(batch_rows, max_rows)
            for micro_step, (ids, targets, keys) in enumerate(micro_batches, start=1):
                with model.sync_gradients(is_last=micro_step == micro_steps):
                    with hardware.autocast():
                        losses = model.wrapped(ids, targets, keys)  # (B, T)
                    (losses.sum() * scale).backward()
                loss_sum += losses.detach().sum()
                if micro_step == 1 and batch.measures_noise_at(self.step, world):
                    micro_grad_sq_norm = squared_grad_norms(model).sum()
                hooks.heartbeat(f"step {self.step + 1}")
                if is_long_step and (stop_reason := stop.agreed(world.gather)):
                    break
            if stop_reason:  # in the middle of a step, which the resumed run repeats
                if self.checkpoint_due(False, stop_reason):
                    self.save_checkpoint()
                break

            # All ranks reach the same verdict, and apply the step or skip it.
            stats = reduce_step_stats(
                model, loss_sum, tokens, stop.requested_here(), seconds, world, micro_grad_sq_norm
            )
            seconds = time.perf_counter() - started
            is_long_step = stats.seconds > LONG_STEP_S
            expected_loss = guard.mean  # before this step's loss enters the mean
            verdict = guard.check(stats)
            is_clipped, layer_stats = False, None
            if is_applied := guard.should_apply(verdict):
                if is_due(self.step + 1, settings.log.health_interval):
                    layer_stats = LayerStats(model)  # copies the weights before the update
                is_clipped = clip_grad_norm(model, stats.grad_norm, settings.optimizer.grad_clip)
                optimizer.step()
            optimizer.zero_grad()
            if micro_grad_sq_norm is not None:
                rows_before = batch.rows
                update_noise_scale(batch, stats, max_rows, model.kind, world)
                log.log_batch_growth(rows_before, batch)
            self.step, self.rows_seen = self.step + 1, self.rows_seen + batch_rows
            log.log_step(
                self.rows_seen, lr, stats, verdict, tokens=tokens, is_applied=is_applied,
                is_clipped=is_clipped, expected_loss=expected_loss,
            )  # fmt: skip
            if layer_stats:
                log.write("health", layers=layer_stats.compute(stats, world))
            if world.size > 1 and is_due(self.step, settings.log.network_interval):
                log.log_network(self.measure_network())
            if guard.should_abort():
                self.checkpointer.wait()
                out_dir = settings.run.out_dir
                raise RunFailed(divergence_message(out_dir, model, stats, guard, self.step))
            hooks.watchdog.end_start_up()
            stop.step = self.step

            # Write a checkpoint, then evaluate, if they are due.
            if stats.stop_requested and self.step < schedule.max_iters:
                stop_reason = stop.agreed(world.gather)
            self.metrics = {}
            eval_due = self.eval_due() and not stop_reason
            if self.checkpoint_due(eval_due, stop_reason):
                self.save_checkpoint(is_evaluated_next=eval_due)
            if eval_due:
                self.metrics = self.evaluate()
                if self.metrics:
                    self.checkpointer.add_metrics(self.step, self.metrics)
                else:
                    stop_reason = stop.agreed(world.gather)
        return stop_reason

    def micro_batches(
        self, batch_rows: int, max_rows: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this rank's share of a step: ids (B, T), targets (B, T), dropout keys (B,).

        The global batch is the next `batch_rows` rows; a micro-batch has at most `max_rows`.
        """
        for own in self.world.row_ranges(batch_rows, max_rows):
            first_row = self.rows_seen + own.start
            rows = torch.from_numpy(self.data.rows(first_row, len(own)))  # (B, T + 1)
            keys = row_keys(self.data.seed, first_row, len(own))
            rows, keys = self.hardware.to_device(rows), self.hardware.to_device(keys)
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), keys

    def eval_due(self) -> bool:
        """Return whether the weights of this step are evaluated."""
        is_last = self.step == self.settings.schedule.max_iters
        return is_last or is_due(self.step, self.settings.evaluation.eval_interval)

    def checkpoint_due(self, eval_due: bool, stop_reason: str | None) -> bool:
        """Return whether a checkpoint is written now; call it on all ranks.

        Weights that are not finite are never written. At a regular step, there is also none after
        a step that was not finite: the weights may be diverging, and their checkpoint would
        displace a good one. If the run stops or ends here, there is one all the same.
        """
        is_last = self.step == self.settings.schedule.max_iters
        is_due_now = eval_due or is_due(self.step, self.settings.checkpoint.checkpoint_interval)
        if not (stop_reason or is_due_now):
            return False
        may_diverge = self.guard.not_finite_in_a_row > 0 and not (is_last or stop_reason)
        return not may_diverge and weights_are_finite(self.model, self.world)

    def save_checkpoint(self, *, is_evaluated_next: bool = False) -> None:
        """Write everything that a resumed run needs."""
        state = State(
            step=self.step,
            rows_seen=self.rows_seen,
            settings=self.settings.model_dump(),
            dataset=self.corpus.fingerprint,
            tokenizer=self.corpus.manifest.tokenizer["fingerprint"],
            metrics=self.metrics,
            guard=self.guard.state_dict(),
            batch=self.batch.state_dict(),
            arithmetic=self.arithmetic,
        )
        self.checkpointer.save(state, is_evaluated_next=is_evaluated_next)

    def evaluate(self) -> dict[str, float]:
        """Estimate the validation loss and return it; return {} if a stop was requested."""
        with self.log.pause_clock():
            try:
                estimate = self.validation.estimate(self.model.gpt)
            except Interrupted:
                return {}
            self.log.log_evaluation(self.rows_seen, estimate)
        return {"val_loss_estimate": estimate, "val_windows": self.validation.estimate_windows}

    def measure_network(self) -> network.Network:
        """Measure the network between the ranks."""
        with self.log.pause_clock():
            return network.measure(self.world, self.hardware.device)

    # --- before the first step, and after the last

    def prepare_checkpoints(self, resume: Checkpoint | None) -> None:
        """Start the checkpointer, which allocates memory during the first evaluation."""
        tokenizer = (self.corpus.directory / TOKENIZER).read_bytes()
        self.checkpointer = AsyncCheckpointer(
            self.settings.checkpoint, self.world, self.model, self.optimizer, tokenizer,
            self.log.log, self.hooks, resume,
        )  # fmt: skip

    def evaluate_at_start(self, resume: Checkpoint | None) -> str | None:
        """Evaluate the starting weights unless that was done; return the reason to stop, if any."""
        if resume is None:
            return None if self.evaluate() else self.hooks.stop.agreed(self.world.gather)
        if self.eval_due() and "val_loss_estimate" not in resume.state.metrics:
            self.metrics = self.evaluate()  # the run was stopped before it could evaluate
            if not self.metrics:
                return self.hooks.stop.agreed(self.world.gather)
            self.checkpointer.add_metrics(self.step, self.metrics)
        return None

    def prepare_first_step(self) -> None:
        """Do what the first step would wait for, then start the clock.

        DDP also decides here, not after the first step, which gradients it sums together: a
        resumed run adds in the same order.
        """
        batch_rows = self.batch.rows_at(self.step)
        max_rows = self.batch.max_rows_per_micro_step(self.step, self.world)
        first_batch = next(self.micro_batches(batch_rows, max_rows))
        warm_up_ddp_buckets(self.model.wrapped, self.hardware, *first_batch)
        if self.world.size > 1 and self.settings.log.network_interval:
            self.log.log_network(
                self.measure_network()
            )  # NCCL connects here, before the clock starts
        self.checkpointer.wait()  # if memory is short, fail here and not at the first checkpoint
        self.hooks.watchdog.begin_first_step()
        self.log.start_clock()

    def evaluate_only(self) -> str | None:
        """Record the loss over the whole val split; return the reason to stop, if any."""
        try:
            val_loss = self.validation.whole(self.model.gpt)
        except Interrupted:
            return self.hooks.stop.agreed(self.world.gather)
        self.log.write("eval_only", val_loss=finite_or_none(val_loss))
        return None

    def evaluate_at_end(self) -> str | None:
        """Evaluate the last and the best checkpoint; return the reason to stop, if any."""
        try:
            evaluate_best_and_last(self.model, self.validation, self.log)
        except Interrupted:
            return self.hooks.stop.agreed(self.world.gather)
        return None


def is_due(step: int, interval: int) -> bool:
    """Return whether what happens every `interval` steps (0: never) is due after `step`."""
    return interval > 0 and step % interval == 0
