"""A replica of the service, as Ray Serve runs it: the app of serving/app.py, with a model inside.

In: settings. Out: an ASGI app behind Serve's proxy. Imports ray: serve.py imports this when Ray's
environment is set.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve

from yuzogpt.config import ServeSettings
from yuzogpt.serving.app import build


@serve.deployment
@serve.ingress()
class Replica:
    """One engine and its queue."""

    def __init__(self, settings: dict[str, Any], keys: Sequence[bytes]) -> None:
        """The model is loaded when the app starts."""
        self.settings = ServeSettings.model_validate(settings)
        self.keys = keys

    def __serve_build_asgi_app__(self) -> Any:
        """Return the app that requests are handed to."""
        self.built = build(self.settings, self.keys, replicas, of_all_replicas)
        return self.built

    async def check_health(self) -> None:
        """Raise if the engine has failed: Serve puts another replica in this one's place."""
        serving = getattr(self.built.state, "serving", None)
        if serving and serving.now.driver.failure:
            raise RuntimeError("the engine has failed") from serving.now.driver.failure

    async def metrics_text(self) -> tuple[str, str]:
        """Return this replica's name and metrics."""
        return name(), self.built.state.metrics_text()


def name() -> str:
    """Return what Serve calls this replica."""
    return str(serve.get_replica_context().replica_id.unique_id)


def replicas() -> int:
    """Count the replicas that share the requests."""
    return int(serve.get_replica_context().world_size)


async def of_all_replicas(text: str) -> Mapping[str, str]:
    """Return the metrics of every replica, by name: of this one alone if another keeps silent."""
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    found = {name(): text}
    try:
        async with asyncio.timeout(5):
            found.update(await handle.broadcast("metrics_text").results_async())
    except Exception:  # one is just ending, or starting: this one's are better than none
        pass
    return found
