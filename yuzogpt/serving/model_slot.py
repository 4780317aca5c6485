"""The model that is served, and the one after it.

In: settings. Out: an engine at work, with what clients may know of it. A better checkpoint of the
run is verified and loaded beside the one that serves; then new requests go to the new one, and the
old one ends with its last request.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from yuzogpt import checkpoints
from yuzogpt.checkpoints import remote
from yuzogpt.checkpoints.format import CorruptCheckpoint
from yuzogpt.checkpoints.resolve import ModelReference, resolve_model, shape_of, with_context
from yuzogpt.config import ServeSettings
from yuzogpt.console.terminal import complain, say
from yuzogpt.errors import reason_of
from yuzogpt.inference.engine import Engine
from yuzogpt.inference.load import load_engine
from yuzogpt.serving.driver import EngineLoop
from yuzogpt.storage.run_storage import RunStorage

Identity = tuple[str, int]  # of a checkpoint: its name, and when its state was written


@dataclass(eq=False)
class LoadedModel:
    """A model at work."""

    reference: ModelReference
    driver: EngineLoop
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def engine(self) -> Engine:
        """What computes."""
        return self.driver.engine

    @property
    def step(self) -> int | None:
        """The training step of the weights."""
        found = self.reference.checkpoint
        return found.state.step if found else None

    @property
    def val_loss(self) -> float | None:
        """The estimate of their validation loss."""
        found = self.reference.checkpoint
        return found.state.metrics.get("val_loss_estimate") if found else None

    @property
    def fingerprint(self) -> str:
        """Which weights, in which arithmetic."""
        step = "" if self.step is None else f"step-{self.step}-"
        return f"{step}{str(self.engine.dtype).removeprefix('torch.')}"

    @contextlib.contextmanager
    def in_use(self) -> "Iterator[LoadedModel]":
        """Keep it at work until the end of a request."""
        self.users += 1
        try:
            yield self
        finally:
            self.users -= 1
            if not self.users:
                self.unused.set()

    async def retire(self) -> None:
        """Stop after the last request."""
        while self.users:
            self.unused.clear()
            await self.unused.wait()
        self.driver.close()


class ModelManager:
    """Whatever is served now."""

    def __init__(self, settings: ServeSettings) -> None:
        """Nothing is loaded yet."""
        self.settings = settings
        self.name = settings.served.model_name or Path(settings.served.model).name
        self.refused: set[Identity] = set()  # for good
        self.troubles: set[str] = set()  # that may pass, as of the last look
        self.working: list[LoadedModel] = []  # what is served, and what ends with its last request
        self.retiring: set[asyncio.Task[None]] = set()
        self.now: LoadedModel

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Load the model, and serve until the end; follow its run, if that is asked for."""
        self.now = await self._load_first()
        following = asyncio.create_task(self._follow()) if self.settings.served.follow else None
        try:
            yield
        finally:
            if following:
                following.cancel()
            for task in self.retiring:
                task.cancel()
            for served in self.working:
                served.driver.close()

    async def _load_first(self) -> LoadedModel:
        while True:
            reference = resolve_model(self.settings.served.model, self.settings.served.context)
            try:
                return await self._load(reference)
            except FileNotFoundError:  # its run goes on, and has replaced it meanwhile
                found = reference.checkpoint
                if found is None or identify(found.directory):
                    raise

    async def _load(self, reference: ModelReference) -> LoadedModel:
        replicas = self.settings.replicas

        def load() -> Engine:
            return load_engine(
                reference,
                reference.tokenizer(),
                self.settings.device,
                replicas.max_batch,
                chunk=replicas.prefill_chunk,
                packed=not replicas.shares(),
                exact=True,
                compiled=self.settings.device.compile,
            )

        served = LoadedModel(
            reference, await EngineLoop.start(load, self.settings.limits.max_waiting)
        )
        if served.engine.slots < replicas.max_batch:
            tell(
                f"{self.name}: {served.engine.slots} requests at a time, not the "
                f"{replicas.max_batch} of max_batch: memory for keys and values is limited"
            )
        self.working.append(served)
        return served

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.settings.served.follow_interval)
            troubles: set[str] = set()
            try:
                await self._improve(troubles)
            except Exception as error:  # the run cannot be looked at
                troubles.add(reason_of(error))
            for trouble in sorted(troubles - self.troubles):
                tell(f"{self.name}: {trouble}; what was loaded goes on")
            self.troubles = troubles

    async def _improve(self, troubles: set[str]) -> None:
        """Serve the best checkpoint that can be loaded, if it is better; note what may pass."""
        passed_over: set[Identity] = set()
        while storage := await asyncio.to_thread(self._look, passed_over):
            directory, name = storage.local, storage.display_name
            identity = identify(directory)
            try:
                found = await asyncio.to_thread(checkpoints.verify, storage, optimizer=False)
                served = self.settings.served
                reference = ModelReference(served.model, shape_of(found), found)
                return await self._replace(with_context(reference, served.context))
            except Exception as error:  # whatever a checkpoint holds: following goes on
                if identity is None or identify(directory) != identity:
                    continue  # its run has deleted it
                passed_over.add(identity)
                if may_pass(error):
                    troubles.add(f"checkpoint {name}: {reason_of(error)}")
                    continue
                self.refused.add(identity)
                why = f"cannot be loaded: {reason_of(error)}"
                if isinstance(error, CorruptCheckpoint):
                    why = f"is corrupt ({error})"
                tell(f"checkpoint {name} {why}; refused, what was loaded goes on")

    async def _replace(self, reference: ModelReference) -> None:
        before, self.now = self.now, await self._load(reference)
        task = asyncio.create_task(self._retire(before))
        self.retiring.add(task)
        task.add_done_callback(self.retiring.discard)
        say(f"{self.name}: now serving step {self.now.step}")

    async def _retire(self, served: LoadedModel) -> None:
        await served.retire()
        self.working.remove(served)

    def _look(self, passed_over: set[Identity]) -> RunStorage | None:
        """Return the best checkpoint that is better than what is served, if there is one."""
        run = remote.open_reference(self.settings.served.model)
        served = self.now.reference.checkpoint
        assert served is not None
        for directory in checkpoints.by_validation_loss(run.local):
            identity = identify(directory)
            if identity is None or identity in self.refused | passed_over:
                continue
            is_new = is_better(checkpoints.read_metrics(directory), served.state.metrics)
            return run / "checkpoints" / directory.name if is_new else None
        return None


def may_pass(error: Exception) -> bool:
    """Tell whether a checkpoint that could not be loaded may be loaded later."""
    is_short = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_short or isinstance(error, OSError) or "can't allocate memory" in str(error)


def is_better(found: Mapping[str, float], served: Mapping[str, float]) -> bool:
    """Compare the metrics of checkpoints; those over other windows are of another evaluation."""
    if found.get("val_windows") != served.get("val_windows"):
        return True
    return found.get("val_loss_estimate", math.inf) < served.get("val_loss_estimate", math.inf)


def identify(directory: Path) -> Identity | None:
    """Return what tells a checkpoint from another of its name; None if it is gone."""
    with contextlib.suppress(OSError):
        return directory.name, (directory / checkpoints.STATE).stat().st_mtime_ns
    return None


def tell(text: str) -> None:
    """Say what went wrong, where whoever runs the server looks."""
    complain(f"!!! {text}")
