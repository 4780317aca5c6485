"""Checkpoints written while training goes on: a step waits for the copy of its tensors alone.

In: the model and optimizer on each rank, and the state of the run. Out: checkpoints (see
checkpoints.py), reported when they are whole and evaluated. A thread of each rank writes; the
threads talk over a group of their own, so that their collectives do not mix with the loop's.

    ddp     rank 0 holds everything, and writes it
    fsdp    each rank writes one file of whole tensors, gathered from all ranks one by one

Where out_dir is in a store, each rank then uploads its files (checkpoints/remote.py).
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from yuzogpt import checkpoints
from yuzogpt.checkpoints import remote
from yuzogpt.checkpoints.format import MODEL, OPTIMIZER, Checkpoint, State, tensor_file
from yuzogpt.checkpoints.safetensors_file import write_tensors
from yuzogpt.config import CheckpointSettings
from yuzogpt.errors import RunFailed, reason_of
from yuzogpt.runs.event_log import MetricsLog
from yuzogpt.runtime.world import COLLECTIVE_TIMEOUT, World
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.training.hooks import LoopHooks
from yuzogpt.training.optimizers import Optimizer, state_tensors
from yuzogpt.training.parallel import ParallelModel, local, rows_of_rank

LOWEST_PRIORITY = 19  # of the thread that writes, as `nice` counts
MOST_FAILURES = 3  # checkpoints in a row that could not be written, before the run ends


class AsyncCheckpointer:
    """Writes one checkpoint at a time, beside the loop."""

    def __init__(
        self,
        settings: CheckpointSettings,
        world: World,
        trainee: ParallelModel,
        optimizer: Optimizer,
        tokenizer: bytes,
        log: MetricsLog | None,
        outside: LoopHooks,
        resume: Checkpoint | None = None,
    ) -> None:
        """Call it on every rank; `log` is rank 0's, the rest as in loop.train."""
        self.settings, self.tokenizer, self.log = settings, tokenizer, log
        self.outside, self.run = outside, outside.run
        self.world = world
        if world.size > 1:
            group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            self.world = dataclasses.replace(world, group=group)
        weights = dict(trainee.model.named_parameters())
        self.is_on_gpu = next(iter(weights.values())).device.type == "cuda"
        self.live: dict[str, Mapping[str, Tensor]] = {
            MODEL: weights,
            OPTIMIZER: state_tensors(trainee.model, optimizer),
        }
        self.parts = share_out(weights, world.size if trainee.kind == "fsdp" else 1)
        self.failures, self.bytes = 0, 0
        # The last checkpoint that is written; its step, or that of one that is being written.
        self.newest = resume
        self.step = resume.state.step if resume else None
        self.copies: dict[str, dict[str, Tensor]] = {MODEL: {}, OPTIMIZER: {}}
        holds_something = trainee.kind == "fsdp" or world.rank == 0
        self.writing: Future[None] = run_in_daemon_thread(
            self._allocate if holds_something else lambda: None
        )

    def save(self, state: State, *, is_evaluated_next: bool = False) -> None:
        """Copy what a checkpoint holds, and write it beside what comes next.

        Waits for the checkpoint before, if that is not written yet; one of the same step is not
        replaced. `is_evaluated_next`: older ones are kept until `add_metrics`. RunFailed, on every
        rank, if checkpoints cannot be written, or out_dir is another command's by now.
        """
        started = time.perf_counter()
        self.wait()
        if state.step == self.step:
            return
        self.step = state.step
        waited = time.perf_counter() - started
        for kind, copies in self.copies.items():
            for name, copy in copies.items():
                copy.copy_(local(self.live[kind][name].detach()), non_blocking=self.is_on_gpu)
        if self.is_on_gpu:
            torch.cuda.synchronize()
        stall = time.perf_counter() - started

        def write() -> None:
            self._write(state, stall, waited)
            if not is_evaluated_next:
                self._prune()

        self.writing = run_in_daemon_thread(write)

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Keep with the checkpoint of a step what was found out since, and report it.

        Beside what comes next, when it is written. A loss that is not finite is of weights that are
        spoilt: their checkpoint is deleted, and no older one for it.
        """
        before = self.writing

        def add() -> None:
            before.result()
            if step != self.step or self.newest is None:  # it could not be written
                return
            storage = self.newest.storage
            is_spoilt = not all(map(math.isfinite, metrics.values()))
            if self.world.rank == 0:
                try:
                    with contextlib.nullcontext() if is_spoilt else contextlib.suppress(OSError):
                        self.outside.refuse_to_write()
                    if is_spoilt:
                        checkpoints.discard(storage)
                    else:
                        checkpoints.add_metrics(storage, metrics)
                except Exception as error:  # the next checkpoint says if the run cannot go on
                    self._notice(step, f"metrics not kept ({reason_of(error)})")
            if is_spoilt:
                self.step = self.newest = None
            else:
                self._prune()
                self.outside.report(metrics, storage)

        self.writing = run_in_daemon_thread(add)

    def wait(self) -> None:
        """Wait until the last checkpoint is written, or known to have failed.

        Slow storage is no hang: waiting for it counts as moving, until COLLECTIVE_TIMEOUT ends it.
        """
        while not self.writing.done():
            self.outside.watchdog.moves()
            concurrent.futures.wait([self.writing], timeout=1)
        self.writing.result()

    def finish(self) -> None:
        """Wait for the last checkpoint of the run; RunFailed if it could not be written."""
        self.wait()
        if self.failures:
            raise RunFailed(
                f"{self.run.display_name}: the last checkpoint could not be written; the same "
                "command goes on from the one before"
            )

    def _allocate(self) -> None:
        """Make room for the copies, and touch it: fresh memory takes longer than the copy."""
        for kind, tensors in self.live.items():
            for name, tensor in tensors.items():
                like = local(tensor.detach())
                room = torch.empty(
                    like.shape, dtype=like.dtype, device="cpu", pin_memory=self.is_on_gpu
                )
                self.copies[kind][name] = room.zero_()

    def _write(self, state: State, stall: float, waited: float) -> None:
        """Write a checkpoint of the copies, agree on how it went, and report it."""
        with contextlib.suppress(OSError, AttributeError):
            # Linux: of this thread alone. Cores that train have no time for it; while the loop
            # waits for it, it has all the time of the machine.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        started = time.perf_counter()
        is_first = self.world.rank == 0
        problem: Exception | None = None
        place: str | None = None
        if is_first:
            try:
                self.outside.refuse_to_write()
                place = checkpoints.begin(self.run, state.step).name
            except Exception as error:  # whatever it is, the other ranks wait for an answer
                problem = error
        place = self.world.broadcast(place)
        if place is not None:
            temporary = self.run / "checkpoints" / place
            hashes, failed = self._write_tensors(temporary, self._storage(state))
            found = self.world.gather((hashes, failed))
            if is_first:
                problem = self._commit(temporary, state, found)
        told = (reason_of(problem), isinstance(problem, RunFailed)) if problem else None
        if failure := self.world.broadcast(told):
            self._note_failure(state, *failure)
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

    def _note_failure(self, state: State, text: str, is_fatal: bool) -> None:
        self.failures, self.step = self.failures + 1, None
        if is_fatal:
            raise RunFailed(text)
        self._notice(state.step, f"could not be written ({text}); training goes on")
        if self.failures >= MOST_FAILURES:
            raise RunFailed(
                f"{self.run.display_name}: {self.failures} checkpoints in a row could not be "
                f"written ({text}); mend that, and the same command goes on from the newest one"
            )

    def _notice(self, step: int, what: str) -> None:
        if self.log:
            self.log.write("notice", step, text=f"!!! checkpoint step-{step} {what}")

    def _write_tensors(
        self, temporary: RunStorage, checkpoint: RunStorage
    ) -> tuple[dict[str, str], str | None]:
        """Write this rank's files; return their hashes, and what went wrong."""
        hashes: dict[str, str] = {}
        failed = None
        staging = remote.staging_dir(temporary, self.world.rank)
        for kind in (MODEL, OPTIMIZER):
            tensors = self._gathered_tensors(kind)
            try:
                if self.world.rank < len(self.parts):
                    file = tensor_file(kind, self.world.rank, len(self.parts))
                    names = self._names(kind, self.world.rank)
                    shapes = {name: self.live[kind][name] for name in names}
                    staging.mkdir(parents=True, exist_ok=True)
                    hashes[file] = write_tensors(staging / file, shapes, tensors)
            except Exception as error:  # whatever it is, the other ranks wait for an answer
                failed = reason_of(error)
            for _ in tensors:  # the other ranks count on this one's part
                pass
        try:
            remote.upload(staging, checkpoint, {} if failed else hashes)
        except Exception as error:
            failed = reason_of(error)
        return hashes, failed

    def _names(self, kind: str, part: int) -> list[str]:
        """Return the tensors of a part: its weights, or what the optimizer knows about them."""
        names = self.parts[part]
        if kind == MODEL:
            return names
        mine = set(names)
        return [path for path in self.live[kind] if path.partition("/")[2] in mine]

    def _gathered_tensors(self, kind: str) -> Iterator[Tensor]:
        """Yield the tensors of this rank's part, whole; take part in gathering the others'.

        In turns, so that all ranks write at the same time.
        """
        all_names = [self._names(kind, part) for part in range(len(self.parts))]
        for turn in itertools.zip_longest(*all_names):
            for owner, name in enumerate(turn):
                if name is None:
                    continue
                if len(self.parts) > 1:
                    whole = self._gather(kind, name, owner)
                else:
                    whole = self.copies[kind].get(name)
                if whole is not None and owner == self.world.rank:
                    yield whole

    def _gather(self, kind: str, name: str, owner: int) -> Tensor | None:
        """Return a tensor, put together of what the ranks hold, on the rank that owns it."""
        part, shape = self.copies[kind][name], self.live[kind][name].shape
        if not isinstance(self.live[kind][name], DTensor):  # such as AdamW's count of steps
            return part
        rows = len(rows_of_rank(shape[0], 0, self.world.size))
        padded = torch.zeros(rows, *shape[1:], dtype=part.dtype)
        padded[: len(part)] = part
        is_mine = owner == self.world.rank
        parts = [torch.empty_like(padded) for _ in range(self.world.size)] if is_mine else None
        dist.gather(padded, parts, dst=owner, group=self.world.group)
        return torch.cat(parts)[: shape[0]] if parts else None

    def _commit(
        self, temporary: RunStorage, state: State, found: list[tuple[dict[str, str], str | None]]
    ) -> Exception | None:
        """Make a checkpoint of what the ranks wrote; return what went wrong, if anything."""
        try:
            for _, failed in found:
                if failed:
                    raise OSError(failed)
            hashes = {file: value for own, _ in found for file, value in own.items()}
            places = {
                tensor_file(kind, part, len(self.parts)): self._names(kind, part)
                for kind in (MODEL, OPTIMIZER)
                for part in range(len(self.parts))
            }
            self.outside.refuse_to_write()
            if self.log:
                self.log.upload()  # a run that goes on from this checkpoint has its records, too
            written = checkpoints.commit(temporary, state, self.tokenizer, hashes, places)
            remote.publish(written.storage)
        except Exception as error:
            shutil.rmtree(temporary.local, ignore_errors=True)
            return error
        with contextlib.suppress(OSError):
            self.bytes = remote.size_of(written.storage)
        return None

    def _prune(self) -> None:
        """Delete the checkpoints that are not kept beside the newest one."""
        if self.world.rank or self.newest is None:
            return
        kept = self.settings
        try:
            self.outside.refuse_to_write()
            checkpoints.prune(self.run, self.newest, kept.keep_last, kept.keep_best)
        except Exception as error:  # the new one is whole, whatever is the matter with old ones
            text = f"!!! old checkpoints could not be deleted ({reason_of(error)})"
            if self.log:
                self.log.write("notice", self.newest.state.step, text=text)


def share_out(tensors: Mapping[str, Tensor], parts: int) -> list[list[str]]:
    """Share names out so that parts have about equally many bytes, each at least one tensor."""
    parts = min(parts, len(tensors))
    names: list[list[str]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        smallest = sizes.index(min(sizes))
        names[smallest].append(name)
        sizes[smallest] += tensor.numel()
    order = {name: index for index, name in enumerate(tensors)}
    return [sorted(part, key=order.__getitem__) for part in names]


def run_in_daemon_thread(job: Callable[[], None]) -> "Future[None]":
    """Run a job in a thread that does not keep the process from ending."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            job()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
