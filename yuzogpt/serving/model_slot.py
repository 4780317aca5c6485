"""The served model, and with --follow its replacement by better checkpoints of the run.

A better checkpoint is verified and loaded beside the current model. Then new requests go to the new
model, and the old one is closed after its last request.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from yuzogpt import checkpoints
from yuzogpt.checkpoints import remote
from yuzogpt.checkpoints.format import CorruptCheckpoint
from yuzogpt.checkpoints.resolve import ModelReference, resolve_model, shape_of, with_context
from yuzogpt.config import ServeSettings
from yuzogpt.console.terminal import complain, note, say_while_waiting
from yuzogpt.errors import reason_of
from yuzogpt.inference.engine import Engine
from yuzogpt.inference.load import load_engine
from yuzogpt.serving.driver import EngineLoop
from yuzogpt.storage.run_storage import RunStorage

Identity = tuple[str, int]  # a checkpoint's name, and when its state was written


@dataclass(eq=False)
class LoadedModel:
    """A loaded model and its engine."""

    reference: ModelReference
    engine_loop: EngineLoop
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def engine(self) -> Engine:
        return self.engine_loop.engine

    @property
    def step(self) -> int | None:
        """The training step of the weights."""
        checkpoint = self.reference.checkpoint
        return checkpoint.state.step if checkpoint else None

    @property
    def val_loss(self) -> float | None:
        """The estimate of the weights' validation loss."""
        checkpoint = self.reference.checkpoint
        return checkpoint.state.metrics.get("val_loss_estimate") if checkpoint else None

    @property
    def fingerprint(self) -> str:
        """Identifies the weights and their dtype."""
        step = "" if self.step is None else f"step-{self.step}-"
        return f"{step}{str(self.engine.dtype).removeprefix('torch.')}"

    @contextlib.contextmanager
    def in_use(self) -> "Iterator[LoadedModel]":
        """Keep the model open during a request."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1
            if not self.users:
                self.idle.set()

    async def retire(self) -> None:
        """Close after the last request."""
        while self.users:
            self.idle.clear()
            await self.idle.wait()
        self.engine_loop.close()


class ModelManager:
    """Loads the served model, and replaces it by better ones."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.name = settings.served.model_name or Path(settings.served.model).name
        self.rejected: set[Identity] = set()  # never tried again
        self.transient_errors: set[str] = set()  # of the last poll; tried again
        self.loaded: list[LoadedModel] = []  # the current model and those that are retiring
        self.retiring: set[asyncio.Task[None]] = set()
        self.current: LoadedModel
        self.after_poll: Callable[[], None] = lambda: None  # called after each poll of the run

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load the model, and keep it loaded during the block; with --follow, poll its run."""
        self.current = await self._load_first()
        following = asyncio.create_task(self._follow()) if self.settings.served.follow else None
        try:
            yield
        finally:
            if following:
                following.cancel()
            for task in self.retiring:
                task.cancel()
            for model in self.loaded:
                model.engine_loop.close()

    async def _load_first(self) -> LoadedModel:
        while True:
            reference = resolve_model(self.settings.served.model, self.settings.served.context)
            say_while_waiting(f"loading model {reference.name} ...")
            try:
                return await self._load(reference)
            except FileNotFoundError:  # the run continues, and has replaced the checkpoint
                checkpoint = reference.checkpoint
                if checkpoint is None or identify(checkpoint.directory):
                    raise

    async def _load(self, reference: ModelReference) -> LoadedModel:
        replicas = self.settings.replicas

        def load() -> Engine:
            return load_engine(
                reference,
                reference.tokenizer(),
                self.settings.device,
                replicas.max_batch,
                prefill_chunk=replicas.prefill_chunk,
                packed=not replicas.shares(),
                exact=True,
                compiled=self.settings.device.compile,
            )

        engine_loop = await EngineLoop.start(load, self.settings.limits.max_waiting)
        model = LoadedModel(reference, engine_loop)
        if model.engine.slots < replicas.max_batch:
            warn(
                f"{self.name}: {model.engine.slots} requests at a time, not the "
                f"{replicas.max_batch} of max_batch: memory for keys and values is limited"
            )
        self.loaded.append(model)
        return model

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.settings.served.follow_interval)
            transient_errors: set[str] = set()
            try:
                await self._load_better(transient_errors)
            except Exception as error:  # the run cannot be read
                transient_errors.add(reason_of(error))
            for transient_error in sorted(transient_errors - self.transient_errors):
                warn(f"{self.name}: {transient_error}; still serving step {self.current.step}")
            self.transient_errors = transient_errors
            self.after_poll()

    async def _load_better(self, transient_errors: set[str]) -> None:
        """Serve the best checkpoint that loads, if it is better; collect transient errors."""
        excluded: set[Identity] = set()
        while storage := await asyncio.to_thread(self._find_better, excluded):
            directory, name = storage.local, storage.display_name
            identity = identify(directory)
            try:
                checkpoint = await asyncio.to_thread(checkpoints.verify, storage, optimizer=False)
                served = self.settings.served
                reference = ModelReference(served.model, shape_of(checkpoint), checkpoint)
                return await self._replace(with_context(reference, served.context))
            except Exception as error:  # a checkpoint may hold anything: keep following
                if identity is None or identify(directory) != identity:
                    continue  # the run has deleted it
                excluded.add(identity)
                if is_transient(error):
                    transient_errors.add(f"checkpoint {name}: {reason_of(error)}")
                    continue
                self.rejected.add(identity)
                problem = f"cannot be loaded: {reason_of(error)}"
                if isinstance(error, CorruptCheckpoint):
                    problem = f"is corrupt ({error})"
                warn(
                    f"checkpoint {name} {problem}; rejected, still serving step {self.current.step}"
                )

    async def _replace(self, reference: ModelReference) -> None:
        previous, self.current = self.current, await self._load(reference)
        task = asyncio.create_task(self._retire(previous))
        self.retiring.add(task)
        task.add_done_callback(self.retiring.discard)
        note(f"{self.name}: now serving step {self.current.step}")

    async def _retire(self, model: LoadedModel) -> None:
        await model.retire()
        self.loaded.remove(model)

    def _find_better(self, excluded: set[Identity]) -> RunStorage | None:
        """Return the best checkpoint of the run, if it is better than the current one."""
        run = remote.open_reference(self.settings.served.model)
        current = self.current.reference.checkpoint
        assert current is not None
        for directory in checkpoints.by_validation_loss(run.local):
            identity = identify(directory)
            if identity is None or identity in self.rejected | excluded:
                continue
            is_new = is_better(checkpoints.read_metrics(directory), current.state.metrics)
            return run / "checkpoints" / directory.name if is_new else None
        return None


def is_transient(error: Exception) -> bool:
    """Return True if loading the checkpoint may succeed later."""
    is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_out_of_memory or isinstance(error, OSError) or "can't allocate memory" in str(error)


def is_better(candidate: Mapping[str, float], current: Mapping[str, float]) -> bool:
    """Compare the metrics of checkpoints; after a change of val_windows any new one is better."""
    if candidate.get("val_windows") != current.get("val_windows"):
        return True
    return candidate.get("val_loss_estimate", math.inf) < current.get("val_loss_estimate", math.inf)


def identify(directory: Path) -> Identity | None:
    """Return what distinguishes a checkpoint from others of its name; None if it is gone."""
    with contextlib.suppress(OSError):
        return directory.name, (directory / checkpoints.STATE).stat().st_mtime_ns
    return None


def warn(text: str) -> None:
    """Print a warning to stderr."""
    complain(f"!!! {text}")
