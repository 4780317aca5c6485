"""Ray Serve: the service on as many replicas as requests need.

In: settings, already checked. Out: a service behind Serve's HTTP proxy, until it is interrupted.
`application` is what a Serve config names (cluster/serve.yaml): there Serve is told by
`serve deploy`, and goes on without a command.
"""

import contextlib
import logging
import math
import os
import threading
from collections.abc import Sequence
from typing import Any

from yuzogpt.config import ServeSettings, with_changes
from yuzogpt.config.resolve import resolve
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.orchestration.causes import cause_of
from yuzogpt.orchestration.cluster import check_reachable, connected
from yuzogpt.orchestration.embedded import is_embedded
from yuzogpt.orchestration.serve.proxy import environment
from yuzogpt.runtime.cores import available_cores, threads_asked
from yuzogpt.runtime.signals import stopped_by_sigterm
from yuzogpt.serving.launch import announce, check, with_free_port

APPLICATION = "yuzogpt"
# The app refuses by itself what is too much, in JSON and at once: Serve's own queue has no end that
# it tells of, and its refusals are plain text.
MOST_AT_ONCE = 10_000
LOOK_EVERY = 5.0  # seconds
SHUT_DOWN_WITHIN = 3.0  # seconds, from an application's end to that of Serve
# Set before ray is imported.
ENVIRONMENT = {"RAY_SERVE_LOG_TO_STDERR": "0"}
HEAVY_IMPORTS = ("torch", "fastapi", "uvicorn")


def serve_on_ray(settings: ServeSettings, keys: Sequence[bytes]) -> None:
    """Serve on an embedded Ray, or on the cluster that the settings name, until interrupted."""
    for name, value in {**ENVIRONMENT, **variables_of_a_proxy(settings)}.items():
        os.environ.setdefault(name, value)
    address = settings.replicas.ray_address or os.environ.get("RAY_ADDRESS", "")
    check_reachable(address)
    if not address:
        settings = with_free_port(settings)
    with stopped_by_sigterm("stopped (SIGTERM)"):
        print("starting Ray ...", flush=True)
        with connected(address, available_cores(), HEAVY_IMPORTS, "ray.serve"):
            run(settings, keys, joined=bool(address))


def run(settings: ServeSettings, keys: Sequence[bytes], joined: bool) -> None:
    """Serve on the Ray that this process is connected to; `joined`: which others started."""
    from ray import serve
    from ray.exceptions import RayActorError

    if APPLICATION in serve.status().applications:
        raise UserError(
            f"this cluster serves an application named {APPLICATION} already; end that first"
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it did is said below
    running = address_of_serve()
    if running:
        settings = at_address(settings, *running)
    elif joined:
        settings = with_free_port(settings)
    http = {"host": settings.http.host, "port": settings.http.port}
    variables = variables_of_a_proxy(settings)
    target = deployment(settings, keys)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options=http,
            controller_options={"runtime_env": {"env_vars": variables}} if joined else None,
        )
        serve.run(target, name=APPLICATION, route_prefix="/")
        announce(settings)
        wait()
    except RayActorError:  # Serve's controller
        raise RunFailed("Serve was shut down on this cluster") from None
    except RuntimeError as error:
        if mistake := mistake_of_a_replica():
            raise UserError(mistake) from None
        raise RunFailed(f"the service could not be started: {cause_of(error)}") from None
    finally:
        with contextlib.suppress(RayActorError):
            serve.delete(APPLICATION)
            if not running and not serve.status().applications:
                serve.shutdown()


def mistake_of_a_replica() -> str | None:
    """Return what the user got wrong that showed only where the model was loaded, if it was that.

    Serve hands over no exceptions, but their text.
    """
    from ray import serve

    found = serve.status().applications.get(APPLICATION)
    for deployment in found.deployments.values() if found else ():
        for line in deployment.message.splitlines():
            _, mark, mistake = str(line).partition(f"{UserError.__module__}.UserError: ")
            if mark:
                return mistake
    return None


def address_of_serve() -> tuple[str, int] | None:
    """Return where a Serve that runs already listens: nothing that it is told later moves it."""
    from ray.serve.context import _get_global_client  # it tells this nowhere else

    client = _get_global_client(raise_if_no_controller_running=False)
    return client and (str(client.http_config.host), int(client.http_config.port))


def at_address(settings: ServeSettings, host: str, port: int) -> ServeSettings:
    """Return the settings with the port of a Serve that runs; UserError if they want another."""
    http = settings.http
    if http.host != host or http.port not in (0, port):
        raise UserError(
            f"--host={http.host} --port={http.port}: Serve runs on this cluster at {host}:{port}; "
            "give these, or end it (serve shutdown)"
        )
    return with_changes(settings, {"http.port": port})


def variables_of_a_proxy(settings: ServeSettings) -> dict[str, str]:
    """Return the environment of Serve's proxies."""
    return environment(most_requests(settings), settings.limits)


def most_requests(settings: ServeSettings) -> int:
    """Return how many requests a proxy lets in: as many as all replicas have places for.

    None more: where they are refused in an instant, the next comes at once, so that nearly all of
    what is too much would go through the proxy, the router and the engine's process.
    """
    places = settings.replicas.max_batch + settings.limits.max_waiting
    return settings.replicas.span()[1] * places


def wait() -> None:
    """Wait until the service fails; Ctrl-C and SIGTERM come through."""
    from ray import serve

    tick = threading.Event()
    while True:
        tick.wait(LOOK_EVERY)
        found = serve.status().applications.get(APPLICATION)
        if found is None:
            tick.wait(SHUT_DOWN_WITHIN)
            serve.status()  # Serve itself may be going: that is an error of its own
            raise RunFailed("the service was deleted")
        if found.status == "DEPLOY_FAILED":
            raise RunFailed(f"the service failed: {found.message}")


def deployment(settings: ServeSettings, keys: Sequence[bytes]) -> Any:
    """Return Serve's application: how many replicas, what each holds, when there are more."""
    from yuzogpt.orchestration.serve.replica import Replica

    least, most = settings.replicas.span()
    threads, gpus = share_of_a_replica(settings, most)
    placed = with_changes(settings, {"device.threads": threads})
    options: dict[str, Any] = {
        "max_ongoing_requests": MOST_AT_ONCE,
        "ray_actor_options": {"num_cpus": threads, "num_gpus": gpus},
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 10,
    }
    if least == most:
        options["num_replicas"] = most
    else:
        options["autoscaling_config"] = {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": settings.replicas.max_batch,
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
        }
    replica: Any = Replica  # Serve's decorator made a deployment of the class
    return replica.options(**options).bind(placed.model_dump(), tuple(keys))


def share_of_a_replica(settings: ServeSettings, most: int) -> tuple[int, int]:
    """Return the threads and the GPUs of a replica: nodes' cores are shared out among all."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    device = settings.device.device
    gpus = sum(resources.get("GPU", 0) for resources in nodes)
    if device == "cuda" and not gpus and is_embedded():
        raise UserError("--device=cuda: Ray finds no GPU here; use --device=cpu")
    if device == "cuda" or (device == "auto" and gpus):
        return settings.device.threads or 1, 1
    cores = sorted(int(resources.get("CPU", 0)) for resources in nodes)
    cores = [count for count in cores if count] or [1]
    beside = math.ceil(most / len(cores))
    return settings.device.threads or threads_asked() or max(1, cores[0] // beside), 0


def application(args: dict[str, Any]) -> Any:
    """Build the application of a Serve config, whose `args` are settings by their names."""
    flags = [f"--{key}={value}" for key, value in args.items()]
    return deployment(*check(resolve(ServeSettings, [], flags)))
