"""The loop's records in metrics.jsonl (runs/event_log.py lists them). Only rank 0 writes."""

import contextlib
import math
import time
from collections.abc import Iterator

from yuzogpt.checkpoints.load import Start
from yuzogpt.config import TrainSettings
from yuzogpt.config.schedule import schedule_notices
from yuzogpt.data.batches import Rows
from yuzogpt.model.gpt import GPT
from yuzogpt.runs.event_log import MetricsLog
from yuzogpt.runtime.device import Hardware
from yuzogpt.runtime.network import Network
from yuzogpt.runtime.world import World
from yuzogpt.training.batch_size import GlobalBatch
from yuzogpt.training.guards import StepStats, Verdict
from yuzogpt.training.slowdown import SlowdownReport


class StepLog:
    """Writes a run's records, and sums up the steps since the last `train` record."""

    def __init__(self, log: MetricsLog | None, settings: TrainSettings, step: int) -> None:
        self.log, self.settings, self.step = log, settings, step  # steps made
        self.tokens_per_step = settings.batch.global_rows * settings.model.block_size
        self.started = time.perf_counter()
        self.steps = self.clipped = self.skipped = self.tokens = 0
        self.has_logged_step = False
        self.slowdown = SlowdownReport()

    def write(self, kind: str, **values: object) -> None:
        """Write a record at the current step."""
        if self.log:
            self.log.write(kind, self.step, **values)

    def log_run_header(
        self,
        world: World,
        hardware: Hardware,
        model: GPT,
        data: Rows,
        rows_seen: int,
        parallel_reason: str,
        start: Start | None,
    ) -> None:
        """Describe the run before it begins."""
        self.slowdown.local_ranks = world.local_size
        shape, rows = model.settings, self.settings.batch.global_rows
        batch = self.settings.batch
        kind = batch.batch_schedule
        grows = "" if kind == "constant" else f", from {batch.batch_start_rows} rows on ({kind})"
        epoch, _ = data.locate(rows_seen)
        workers = f"{world.size} worker(s) x {hardware.threads} thread(s) on {hardware.device.type}"
        for line in (
            f"model: {model.num_parameters() / 1e6:.2f}M parameters, {shape.n_layer} layers, "
            f"{shape.n_embd} wide, context {shape.block_size}",
            f"batch: {rows} rows x {shape.block_size} = {self.tokens_per_step:,} tokens a step"
            + grows,
            f"data: epoch {epoch + 1} has {data.windows(epoch):,} rows; "
            f"its phase leaves {data.dropped(epoch):,} of {len(data.stream):,} tokens out",
            "; ".join((workers, parallel_reason, *hardware.reasons)),
            f"resuming at step {self.step}"
            if self.step
            else f"weights: {start.reference.name if start else self.settings.run.init_from}",
            *self._frozen_layers(model),
            *schedule_notices(self.settings.schedule, self.settings.optimizer.learning_rate),
        ):
            self.write("notice", text=line)

    def _frozen_layers(self, model: GPT) -> list[str]:
        """Return a line about the frozen part of a model, if any."""
        if not self.settings.finetuning.freeze_layers:
            return []
        sizes = [(p.numel() / 1e6, p.requires_grad) for p in model.parameters()]
        trainable = sum(size for size, is_trainable in sizes if is_trainable)
        return [
            f"frozen: embeddings and the first {self.settings.finetuning.freeze_layers} layers; "
            f"{trainable:.2f}M of {sum(size for size, _ in sizes):.2f}M parameters learn"
        ]

    def log_start(self, world: World, parallel: str, start: Start | None) -> None:
        """Record that the loop starts or resumes, from which weights, and the steps to redo."""
        weights = {"weights": start.reference.name, "weights_sha256": start.sha256} if start else {}
        block_size = self.settings.model.block_size
        begun = {"begun": self.log.begun} if self.log and self.log.begun else {}
        self.write(
            "start",
            workers=world.size,
            parallel=parallel,
            redone_steps=self.log.undone_steps if self.log else 0,
            redone_tokens=self.log.undone_rows * block_size if self.log else 0,
            tokens_per_step=self.tokens_per_step,
            **weights,
            **begun,
        )

    def start_clock(self) -> None:
        """Start the measurement of tokens_per_second."""
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def pause_clock(self) -> Iterator[None]:
        """Exclude the time of this context from tokens_per_second."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def log_step(
        self,
        rows_seen: int,
        lr: float,
        stats: StepStats,
        verdict: Verdict,
        *,
        tokens: int,
        is_applied: bool,
        is_clipped: bool,
        expected_loss: float,
    ) -> None:
        """Count a step; write a `first_step` record, and every log_interval steps a `train` one."""
        self.step += 1
        self.steps += 1
        self.tokens += tokens
        self.clipped += is_clipped
        self.skipped += not is_applied
        if slow := self.slowdown.after_step(stats.seconds, tokens):
            self.write("notice", text=slow)
        if verdict != "healthy":
            self._log_unusual_step(stats, verdict, is_applied, expected_loss)
        is_last = stats.stop_requested or self.step == self.settings.schedule.max_iters
        if not self.has_logged_step:  # a launcher in another process waits for it
            self.has_logged_step = True
            self.write("first_step")
        if self.step % self.settings.log.log_interval and not is_last:
            return
        now = time.perf_counter()
        self.write(
            "train",
            rows_seen=rows_seen,
            loss=finite_or_none(stats.loss),
            lr=lr,
            grad_norm=finite_or_none(stats.grad_norm),
            clip_rate=round(self.clipped / self.steps, 4),
            skipped=self.skipped,
            tokens_per_second=round(self.tokens / (now - self.started), 1),
            tokens_per_step=round(self.tokens / self.steps),
        )
        self.started, self.steps, self.clipped, self.skipped, self.tokens = now, 0, 0, 0, 0

    def _log_unusual_step(
        self, stats: StepStats, verdict: Verdict, is_applied: bool, expected: float
    ) -> None:
        skipped = "" if is_applied else "; skipped"
        if verdict == "spike":
            text = f"!!! step {self.step}: loss {stats.loss:.4f}, about {expected:.4f} expected"
            self.write("spike", text=text + skipped, loss=stats.loss, expected=expected)
        else:
            reason = f"loss {stats.loss}, gradient norm {stats.grad_norm}"
            text = f"!!! step {self.step}: {reason}{skipped}"
            self.write("skip", text=text, reason=reason)

    def log_evaluation(self, rows_seen: int, estimate: float) -> None:
        """Record an estimate of the validation loss."""
        self.write("evaluation", rows_seen=rows_seen, val_loss_estimate=finite_or_none(estimate))

    def log_batch_growth(self, before: int, batch: GlobalBatch) -> None:
        """Record the growth of the batch, if it grew."""
        if batch.rows > before:
            scale = f"the gradient's noise scale is about {batch.noise_scale:,.0f} rows"
            self.write("notice", text=f"{scale}: the batch grows from {before} to {batch.rows}")

    def log_network(self, network: Network) -> None:
        """Record the network's latency and bandwidth between the ranks."""
        source, target = network.slowest
        self.write(
            "network",
            latency_ms=round(1000 * network.latency, 3),
            mbit_per_second=round(network.bandwidth / 1e6, 1),
            slowest_hop=f"rank {source} to {target}",
            slowest_mbit_per_second=round(network.slowest_bandwidth / 1e6, 1),
        )

    def log_stop(self, reason: str, kept: int | None) -> None:
        """Record that the run stops because it was asked to; `kept`: its newest checkpoint."""
        text = f"stopped at step {self.step}: {reason}"
        self.write("stop", text=text, reason=reason, kept=kept)


def finite_or_none(value: float) -> float | None:
    """Return a value as JSON can hold it: None if it is not finite."""
    return value if math.isfinite(value) else None
