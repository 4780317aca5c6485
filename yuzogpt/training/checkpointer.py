"""Asynchronous checkpointing: save() blocks only while tensors are copied to host memory.

A background thread of each rank writes the copies while training continues (gathering.py: which
rank writes what). These threads have a process group of their own, so that their collectives do not
mix with the loop's. If out_dir is in a store, each rank then uploads its files (remote.py). A
checkpoint holds everything in a run's state, so that a resumed run is bit-identical.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import Tensor

from yuzogpt import checkpoints
from yuzogpt.checkpoints import remote
from yuzogpt.checkpoints.format import MODEL, OPTIMIZER, Checkpoint, State, tensor_file
from yuzogpt.checkpoints.safetensors_file import write_tensors
from yuzogpt.config import CheckpointSettings
from yuzogpt.errors import RunFailed, reason_of
from yuzogpt.runs.event_log import MetricsLog
from yuzogpt.runtime.world import COLLECTIVE_TIMEOUT, World
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.training.gathering import FileLayout, partition_by_size
from yuzogpt.training.hooks import LoopHooks
from yuzogpt.training.optimizers import Optimizer, state_tensors
from yuzogpt.training.parallel import ParallelModel, to_local

WRITER_NICENESS = 19  # the lowest priority
MAX_CONSECUTIVE_FAILURES = 3  # checkpoints that could not be written, before the run ends


class AsyncCheckpointer:
    """Writes checkpoints in a background thread, one at a time."""

    def __init__(
        self,
        settings: CheckpointSettings,
        world: World,
        model: ParallelModel,
        optimizer: Optimizer,
        tokenizer: bytes,
        log: MetricsLog | None,
        hooks: LoopHooks,
        resume: Checkpoint | None = None,
    ) -> None:
        """Call it on every rank; `log` is None on all but rank 0."""
        self.settings, self.tokenizer, self.log = settings, tokenizer, log
        self.hooks, self.run = hooks, hooks.run_dir
        self.world = world
        if world.size > 1:
            group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            self.world = dataclasses.replace(world, group=group)
        weights = dict(model.gpt.named_parameters())
        self.is_on_gpu = next(iter(weights.values())).device.type == "cuda"
        self.live: dict[str, Mapping[str, Tensor]] = {
            MODEL: weights,
            OPTIMIZER: state_tensors(model.gpt, optimizer),
        }
        parts = partition_by_size(weights, world.size if model.kind == "fsdp" else 1)
        self.layout = FileLayout(self.live, parts)
        self.failures, self.bytes = 0, 0
        # The last checkpoint that was written; its step, or the step of one that is being written.
        self.newest = resume
        self.step = resume.state.step if resume else None
        self.copies: dict[str, dict[str, Tensor]] = {MODEL: {}, OPTIMIZER: {}}
        has_copies = model.kind == "fsdp" or world.rank == 0
        self.writing: Future[None] = run_in_daemon_thread(
            self._allocate if has_copies else lambda: None
        )

    def save(self, state: State, *, is_evaluated_next: bool = False) -> None:
        """Copy the tensors of a checkpoint to host memory, and start to write them.

        Waits for the previous checkpoint if that is not written yet. A checkpoint of the same step
        is not replaced. `is_evaluated_next`: older ones are kept until `add_metrics`. RunFailed, on
        every rank, if checkpoints cannot be written, or if another command took out_dir over.
        """
        started = time.perf_counter()
        self.wait()
        if state.step == self.step:
            return
        self.step = state.step
        waited = time.perf_counter() - started
        for kind, copies in self.copies.items():
            for name, copy in copies.items():
                copy.copy_(to_local(self.live[kind][name].detach()), non_blocking=self.is_on_gpu)
        if self.is_on_gpu:
            torch.cuda.synchronize()
        stall = time.perf_counter() - started

        def write() -> None:
            self._write(state, stall, waited)
            if not is_evaluated_next:
                self._prune()

        self.writing = run_in_daemon_thread(write)

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Add metrics to the checkpoint of a step once it is written, and report it.

        If the loss is not finite, the weights diverged: that checkpoint is deleted, and older ones
        are kept.
        """
        previous = self.writing

        def add() -> None:
            previous.result()
            if step != self.step or self.newest is None:  # it could not be written
                return
            storage = self.newest.storage
            has_diverged = not all(map(math.isfinite, metrics.values()))
            if self.world.rank == 0:
                try:
                    with contextlib.nullcontext() if has_diverged else contextlib.suppress(OSError):
                        self.hooks.check_still_holder()
                    if has_diverged:
                        checkpoints.discard(storage)
                    else:
                        checkpoints.add_metrics(storage, metrics)
                except Exception as error:  # the next checkpoint fails if the run cannot continue
                    self._notice(step, f"metrics not kept ({reason_of(error)})")
            if has_diverged:
                self.step = self.newest = None
            else:
                self._prune()
                self.hooks.report(metrics, storage)

        self.writing = run_in_daemon_thread(add)

    def wait(self) -> None:
        """Wait until the last checkpoint is written or has failed.

        Slow storage is not a hang: waiting counts as progress, up to COLLECTIVE_TIMEOUT.
        """
        while not self.writing.done():
            self.hooks.watchdog.heartbeat()
            concurrent.futures.wait([self.writing], timeout=1)
        self.writing.result()

    def finish(self) -> None:
        """Wait for the last checkpoint of the run; RunFailed if it could not be written."""
        self.wait()
        if self.failures:
            raise RunFailed(
                f"{self.run.display_name}: the last checkpoint could not be written; the same "
                "command resumes from the one before"
            )

    def _allocate(self) -> None:
        """Allocate and touch the memory for copies: the first touch takes longer than a copy."""
        for kind, tensors in self.live.items():
            for name, tensor in tensors.items():
                shard = to_local(tensor.detach())
                copy = torch.empty(
                    shard.shape, dtype=shard.dtype, device="cpu", pin_memory=self.is_on_gpu
                )
                self.copies[kind][name] = copy.zero_()

    def _write(self, state: State, stall: float, waited: float) -> None:
        """Write a checkpoint of the copies; agree with all ranks on success, and log it."""
        with contextlib.suppress(OSError, AttributeError):
            # On Linux, this thread's priority alone. It should not slow down cores that train;
            # while the loop waits for it, cores are free anyway.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        started = time.perf_counter()
        is_committer = self.world.rank == 0
        problem: Exception | None = None
        temporary_name: str | None = None
        if is_committer:
            try:
                self.hooks.check_still_holder()
                temporary_name = checkpoints.begin(self.run, state.step).name
            except Exception as error:  # of any kind: the other ranks wait for an answer
                problem = error
        temporary_name = self.world.broadcast(temporary_name)
        if temporary_name is not None:
            temporary = self.run / "checkpoints" / temporary_name
            hashes, error_text = self._write_tensors(temporary, self._storage(state))
            results = self.world.gather((hashes, error_text))
            if is_committer:
                problem = self._commit(temporary, state, results)
        failure = (reason_of(problem), isinstance(problem, RunFailed)) if problem else None
        if failure := self.world.broadcast(failure):
            self._count_failure(state, *failure)
            return
        self.failures = 0
        if self.log:
            self.log.write(
                "checkpoint",
                state.step,
                stall_seconds=round(stall, 4),
                waited_seconds=round(waited, 4),
                write_seconds=round(time.perf_counter() - started, 3),
                bytes=self.bytes,
            )
        self.newest = Checkpoint(self._storage(state), state)

    def _storage(self, state: State) -> RunStorage:
        return self.run / "checkpoints" / f"step-{state.step}"

    def _count_failure(self, state: State, text: str, is_fatal: bool) -> None:
        self.failures, self.step = self.failures + 1, None
        if is_fatal:
            raise RunFailed(text)
        self._notice(state.step, f"could not be written ({text}); training continues")
        if self.failures >= MAX_CONSECUTIVE_FAILURES:
            raise RunFailed(
                f"{self.run.display_name}: {self.failures} checkpoints in a row could not be "
                f"written ({text}); fix that; the same command resumes from the newest one"
            )

    def _notice(self, step: int, what: str) -> None:
        if self.log:
            self.log.write("notice", step, text=f"!!! checkpoint step-{step} {what}")

    def _write_tensors(
        self, temporary: RunStorage, checkpoint: RunStorage
    ) -> tuple[dict[str, str], str | None]:
        """Write this rank's files; return their hashes, and the error if there was one."""
        hashes: dict[str, str] = {}
        error_text = None
        staging = remote.staging_dir(temporary, self.world.rank)
        for kind in (MODEL, OPTIMIZER):
            tensors = self.layout.gathered_tensors(kind, self.copies[kind], self.world)
            try:
                if self.world.rank < len(self.layout.parts):
                    file = tensor_file(kind, self.world.rank, len(self.layout.parts))
                    names = self.layout.names(kind, self.world.rank)
                    shapes = {name: self.live[kind][name] for name in names}
                    staging.mkdir(parents=True, exist_ok=True)
                    hashes[file] = write_tensors(staging / file, shapes, tensors)
            except Exception as error:  # of any kind: the other ranks wait for an answer
                error_text = reason_of(error)
            for _ in tensors:  # the other ranks need this one to take part
                pass
        try:
            remote.upload(staging, checkpoint, {} if error_text else hashes)
        except Exception as error:
            error_text = reason_of(error)
        return hashes, error_text

    def _commit(
        self, temporary: RunStorage, state: State, results: list[tuple[dict[str, str], str | None]]
    ) -> Exception | None:
        """Commit the ranks' files as a checkpoint; return the error, if any."""
        try:
            for _, error_text in results:
                if error_text:
                    raise OSError(error_text)
            hashes = {file: value for own, _ in results for file, value in own.items()}
            parts = len(self.layout.parts)
            contents = {
                tensor_file(kind, part, parts): self.layout.names(kind, part)
                for kind in (MODEL, OPTIMIZER)
                for part in range(parts)
            }
            self.hooks.check_still_holder()
            if self.log:
                self.log.upload()  # a run resumed from here needs its records
            written = checkpoints.commit(temporary, state, self.tokenizer, hashes, contents)
            remote.publish(written.storage)
        except Exception as error:
            shutil.rmtree(temporary.local, ignore_errors=True)
            return error
        with contextlib.suppress(OSError):
            self.bytes = remote.size_of(written.storage)
        return None

    def _prune(self) -> None:
        """Delete checkpoints, except the newest and those that keep_last and keep_best keep."""
        if self.world.rank or self.newest is None:
            return
        try:
            self.hooks.check_still_holder()
            checkpoints.prune(
                self.run, self.newest, self.settings.keep_last, self.settings.keep_best
            )
        except Exception as error:  # harmless: the new one is complete
            text = f"!!! old checkpoints could not be deleted ({reason_of(error)})"
            if self.log:
                self.log.write("notice", self.newest.state.step, text=text)


def run_in_daemon_thread(job: Callable[[], None]) -> "Future[None]":
    """Run a job in a thread that does not keep the process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            job()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
