"""A replica of the service, as Ray Serve runs it: the app of serving/app.py, with a model inside.

In: settings. Out: an ASGI app behind Serve's proxy. Imports ray: serve.py imports this when Ray's
environment is set.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ray import serve

from yuzogpt.config import ServeSettings
from yuzogpt.errors import UserError
from yuzogpt.serving.app import build


@serve.deployment
@serve.ingress()
class Replica:
    """One engine and its queue."""

    def __init__(self, settings: dict[str, Any], keys: Sequence[bytes]) -> None:
        """The model is loaded when the app starts."""
        self.settings = ServeSettings.model_validate(settings)
        self.keys = keys
        self.asking: asyncio.Task[dict[str, str]] | None = None  # the replicas for their metrics
        self.mistake: UserError | None = None  # that shows when the model is loaded

    def __serve_build_asgi_app__(self) -> Any:
        """Return the app that requests are handed to."""
        self.built = build(self.settings, self.keys, self.of_all_replicas)
        load = self.built.router.lifespan_context

        @contextlib.asynccontextmanager
        async def loaded(app: Any) -> AsyncIterator[None]:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    await stack.enter_async_context(load(app))
                except UserError as error:  # Serve tells nobody what is raised here
                    self.mistake = error
                yield

        self.built.router.lifespan_context = loaded
        return self.built

    async def check_health(self) -> None:
        """Raise without an engine that works: Serve puts another replica in this one's place."""
        if self.mistake:
            raise self.mistake
        manager = getattr(self.built.state, "manager", None)
        if manager and manager.current.engine_loop.failure:
            raise RuntimeError("the engine has failed") from manager.current.engine_loop.failure

    async def metrics_text(self) -> tuple[str, str]:
        """Return this replica's name and metrics."""
        return name(), self.built.state.metrics_text()

    async def of_all_replicas(self, text: str) -> Mapping[str, str]:
        """Return the metrics of every replica, by name; those of this one are its `text`.

        However many ask, the replicas are asked once at a time.
        """
        if self.asking is None or self.asking.done():
            self.asking = asyncio.create_task(ask_all())
        return {**await asyncio.shield(self.asking), name(): text}


def name() -> str:
    """Return what Serve calls this replica."""
    return str(serve.get_replica_context().replica_id.unique_id)


async def ask_all() -> dict[str, str]:
    """Return the metrics of every replica, by name; of none if one keeps silent."""
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        async with asyncio.timeout(5):
            return dict(await handle.broadcast("metrics_text").results_async())
    except Exception:  # one is just ending, or starting: the asker's are better than none
        return {}
