"""A replica of the service, as Ray Serve runs it: the app of serving/app.py, with a model inside.

Imports ray: deployment.py imports this after Ray's environment is set.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ray import serve

from yuzogpt.config import ServeSettings
from yuzogpt.errors import UserError
from yuzogpt.runtime.cores import limit_spinning
from yuzogpt.serving.app import build


@serve.deployment
@serve.ingress()
class Replica:
    """One engine and its queue."""

    def __init__(self, settings: dict[str, Any], keys: Sequence[bytes]) -> None:
        limit_spinning()  # `serve deploy` is no command of ours
        self.settings = ServeSettings.model_validate(settings)
        self.keys = keys
        self.request: asyncio.Task[dict[str, str]] | None = None  # for all replicas' metrics
        self.mistake: UserError | None = None  # found when the model is loaded

    def __serve_build_asgi_app__(self) -> Any:
        """Return the app that answers requests; Serve documents this method in `serve.ingress`."""
        self.built = build(self.settings, self.keys, self.all_metrics)
        load = self.built.router.lifespan_context

        @contextlib.asynccontextmanager
        async def loaded(app: Any) -> AsyncIterator[None]:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    await stack.enter_async_context(load(app))
                except UserError as error:  # Serve does not pass on what is raised here
                    self.mistake = error
                yield

        self.built.router.lifespan_context = loaded
        return self.built

    async def check_health(self) -> None:
        """Raise if the engine does not work: Serve then replaces this replica."""
        if self.mistake:
            raise self.mistake
        manager = getattr(self.built.state, "manager", None)
        if manager and manager.current.engine_loop.failure:
            raise RuntimeError("the engine has failed") from manager.current.engine_loop.failure

    async def metrics_text(self) -> tuple[str, str]:
        """Return this replica's name and metrics."""
        return name(), self.built.state.metrics_text()

    async def all_metrics(self, text: str) -> Mapping[str, str]:
        """Return the metrics of every replica, by name; this one's are `text`.

        Concurrent calls share one request to the replicas.
        """
        if self.request is None or self.request.done():
            self.request = asyncio.create_task(request_metrics())
        return {**await asyncio.shield(self.request), name(): text}


def name() -> str:
    """Return Serve's name of this replica."""
    return str(serve.get_replica_context().replica_id.unique_id)


async def request_metrics() -> dict[str, str]:
    """Return the metrics of every replica, by name; of none if one does not answer."""
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        async with asyncio.timeout(5):
            return dict(await handle.broadcast("metrics_text").results_async())
    except Exception:  # a replica is starting or ending; this one's are better than none
        return {}
