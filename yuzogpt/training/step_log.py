"""What the loop says of itself, in metrics.jsonl: by rank 0; the other ranks say nothing.

In: what happened. Out: records, as metrics.py lists them.
"""

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


class StepLog:
    """Writes a run's records, and counts what happened since the last train record."""

    def __init__(self, log: MetricsLog | None, settings: TrainSettings, step: int) -> None:
        """`step`: from which the run goes on."""
        self.log, self.settings, self.step = log, settings, step
        self.tokens_per_step = settings.batch.global_rows * settings.model.block_size
        self.started, self.steps, self.clipped, self.skipped = time.perf_counter(), 0, 0, 0
        self.tokens = 0

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
        why: str,
        start: Start | None,
    ) -> None:
        """Say what is about to happen, before it does."""
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
            "; ".join((workers, why, *hardware.reasons)),
            f"resuming at step {self.step}"
            if self.step
            else f"weights: {start.reference.name if start else self.settings.run.init_from}",
            *self._what_learns(model),
            *schedule_notices(self.settings.schedule, self.settings.optimizer.learning_rate),
        ):
            self.write("notice", text=line)

    def _what_learns(self, model: GPT) -> list[str]:
        """Say how much of a model learns, if not all of it."""
        if not self.settings.finetuning.freeze_layers:
            return []
        sizes = [(p.numel() / 1e6, p.requires_grad) for p in model.parameters()]
        learning = sum(size for size, learns in sizes if learns)
        return [
            f"frozen: embeddings and the first {self.settings.finetuning.freeze_layers} layers; "
            f"{learning:.2f}M of {sum(size for size, _ in sizes):.2f}M parameters learn"
        ]

    def start(self, world: World, parallel: str, start: Start | None) -> None:
        """Say that the loop begins, or goes on, from which weights, and what was lost for it."""
        of = {"weights": start.reference.name, "weights_sha256": start.sha256} if start else {}
        block_size = self.settings.model.block_size
        self.write(
            "start",
            workers=world.size,
            parallel=parallel,
            redone_steps=self.log.undone_steps if self.log else 0,
            redone_tokens=self.log.undone_rows * block_size if self.log else 0,
            tokens_per_step=self.tokens_per_step,
            **of,
        )

    def clock(self) -> None:
        """Begin to measure tokens_per_second here."""
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def pause_clock(self) -> Iterator[None]:
        """Leave what happens meanwhile out of tokens_per_second."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def after_step(
        self,
        rows_seen: int,
        lr: float,
        totals: StepStats,
        verdict: Verdict,
        *,
        tokens: int,
        taken: bool,
        clipped: bool,
        expected: float,
    ) -> None:
        """Count a step; write of it what is due."""
        self.step += 1
        self.steps += 1
        self.tokens += tokens
        self.clipped += clipped
        self.skipped += not taken
        if verdict != "healthy":
            self._odd_step(totals, verdict, taken, expected)
        is_last = totals.stopping or self.step == self.settings.schedule.max_iters
        if self.step % self.settings.log.log_interval and not is_last:
            return
        now = time.perf_counter()
        self.write(
            "train",
            rows_seen=rows_seen,
            loss=finite(totals.loss),
            lr=lr,
            grad_norm=finite(totals.gradient_norm),
            clip_rate=round(self.clipped / self.steps, 4),
            skipped=self.skipped,
            tokens_per_second=round(self.tokens / (now - self.started), 1),
            tokens_per_step=round(self.tokens / self.steps),
        )
        self.started, self.steps, self.clipped, self.skipped, self.tokens = now, 0, 0, 0, 0

    def _odd_step(
        self, totals: StepStats, verdict: Verdict, is_taken: bool, expected: float
    ) -> None:
        taken = "" if is_taken else "; skipped"
        if verdict == "spike":
            text = f"!!! step {self.step}: loss {totals.loss:.4f}, about {expected:.4f} expected"
            self.write("spike", text=text + taken, loss=totals.loss, expected=expected)
        else:
            reason = f"loss {totals.loss}, gradient norm {totals.gradient_norm}"
            text = f"!!! step {self.step}: {reason}{taken}"
            self.write("skip", text=text, reason=reason)

    def evaluation(self, rows_seen: int, estimate: float) -> None:
        """Write the estimate of the validation loss."""
        self.write("evaluation", rows_seen=rows_seen, val_loss_estimate=finite(estimate))

    def batch(self, before: int, batch: GlobalBatch) -> None:
        """Say so if the batch grows, and why."""
        if batch.rows > before:
            scale = f"the gradient's noise scale is about {batch.noise_scale:,.0f} rows"
            self.write("notice", text=f"{scale}: the batch grows from {before} to {batch.rows}")

    def network(self, network: Network) -> None:
        """Write how fast the ranks reach each other."""
        source, target = network.slowest
        self.write(
            "network",
            latency_ms=round(1000 * network.latency, 3),
            mbit_per_second=round(network.bandwidth / 1e6, 1),
            slowest_hop=f"rank {source} to {target}",
            slowest_mbit_per_second=round(network.slowest_bandwidth / 1e6, 1),
        )

    def stop(self, reason: str) -> None:
        """Say that the run stops here, as it was asked to."""
        self.write("stop", text=f"stopped at step {self.step}: {reason}", reason=reason)


def finite(value: float) -> float | None:
    """Return a number that JSON has, or nothing."""
    return value if math.isfinite(value) else None
