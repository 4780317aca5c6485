"""Ray Serve: the service on as many replicas as requests need.

The service runs behind Serve's HTTP proxy until the command is interrupted. `application` is what
a Serve config names (cluster/serve.yaml): after `serve deploy` it runs without a command.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

from yuzogpt.config import (
    DeviceSettings,
    LimitSettings,
    ReplicaSettings,
    ServeSettings,
    with_changes,
)
from yuzogpt.config.resolve import resolve
from yuzogpt.console.terminal import note
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.orchestration.causes import cause_of
from yuzogpt.orchestration.cluster import check_reachable, connected
from yuzogpt.orchestration.embedded import is_embedded
from yuzogpt.orchestration.environment import SERVE, cluster_address, set_defaults
from yuzogpt.orchestration.optional_names import is_left_out
from yuzogpt.orchestration.ray_internals import FEATURES, has, serve_address
from yuzogpt.orchestration.serve.proxy import environment
from yuzogpt.runtime.cores import available_cores, threads_asked
from yuzogpt.runtime.signals import stopped_by_sigterm
from yuzogpt.serving.launch import announce, check, with_free_port

APPLICATION = "yuzogpt"
# The app itself refuses too many requests, in JSON and at once. Serve's own queue reports no limit,
# and its refusals are plain text.
MAX_ONGOING_REQUESTS = 10_000
POLL_INTERVAL_S = 5.0
SHUTDOWN_TIMEOUT_S = 3.0  # from an application's end to Serve's
HEAVY_IMPORTS = ("torch", "fastapi", "uvicorn")


def serve_on_ray(settings: ServeSettings, keys: Sequence[bytes]) -> None:
    """Serve on an embedded Ray, or on the cluster that the settings name, until interrupted."""
    set_defaults(SERVE, proxy_variables(settings))
    address = cluster_address(settings.replicas.ray_address)
    check_reachable(address)
    if not address:
        settings = with_free_port(settings)
    with stopped_by_sigterm("stopped (SIGTERM)"):
        note("starting Ray ...")
        with connected(address, available_cores(), HEAVY_IMPORTS, "ray.serve"):
            run(settings, keys, joined=bool(address))


def run(settings: ServeSettings, keys: Sequence[bytes], joined: bool) -> None:
    """Serve on the Ray that this process is connected to; `joined`: others started it."""
    from ray import serve
    from ray.exceptions import RayActorError

    if APPLICATION in serve.status().applications:
        raise UserError(
            f"this cluster serves an application named {APPLICATION} already; end that first"
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # `announce` says what it did
    has("proxy_callback")  # else reports what is lost
    running = serve_address()
    if running:
        settings = with_address(settings, *running)
    elif joined:
        settings = with_free_port(settings)
    http = {"host": settings.http.host, "port": settings.http.port}
    variables = proxy_variables(settings)
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
        if mistake := replica_mistake():
            raise UserError(mistake) from None
        raise RunFailed(f"the service could not be started: {cause_of(error)}") from None
    finally:
        with contextlib.suppress(RayActorError):
            serve.delete(APPLICATION)
            if not running and not serve.status().applications:
                serve.shutdown()


def replica_mistake() -> str | None:
    """Return the UserError that a replica met when it loaded the model, if it did.

    Serve passes on the text of exceptions only.
    """
    from ray import serve

    status = serve.status().applications.get(APPLICATION)
    for deployment in status.deployments.values() if status else ():
        for line in deployment.message.splitlines():
            _, mark, mistake = str(line).partition(f"{UserError.__module__}.UserError: ")
            if mark:
                return mistake
    return None


def with_address(settings: ServeSettings, host: str, port: int) -> ServeSettings:
    """Return the settings with the port of a Serve that runs; UserError if they want another."""
    http = settings.http
    if http.host != host or http.port not in (0, port):
        raise UserError(
            f"--host={http.host} --port={http.port}: Serve runs on this cluster at {host}:{port}; "
            "give these, or end it (serve shutdown)"
        )
    return with_changes(settings, {"http.port": port})


def proxy_variables(settings: ServeSettings) -> dict[str, str]:
    """Return the environment of Serve's proxies."""
    if is_left_out(FEATURES["proxy_callback"].names[0]):
        return {}
    return environment(max_requests(settings.replicas, settings.limits), settings.limits)


def max_requests(replicas: ReplicaSettings, limits: LimitSettings) -> int:
    """Return how many requests a proxy admits: as many as all replicas have places for.

    A replica would refuse more in an instant, and the next would come at once: nearly all excess
    requests would pass through the proxy, the router and the engine's process.
    """
    return replicas.span()[1] * (replicas.max_batch + limits.max_waiting)


def wait() -> None:
    """Wait until the service fails; Ctrl-C and SIGTERM interrupt this."""
    from ray import serve

    tick = threading.Event()
    while True:
        tick.wait(POLL_INTERVAL_S)
        status = serve.status().applications.get(APPLICATION)
        if status is None:
            tick.wait(SHUTDOWN_TIMEOUT_S)
            serve.status()  # Serve itself may be going: that is an error of its own
            raise RunFailed("the service was deleted")
        if status.status == "DEPLOY_FAILED":
            raise RunFailed(f"the service failed: {status.message}")


def deployment(settings: ServeSettings, keys: Sequence[bytes]) -> Any:
    """Return Serve's application: number of replicas, resources of each, autoscaling."""
    from yuzogpt.orchestration.serve.replica import Replica

    least, most = settings.replicas.span()
    threads, gpus = replica_resources(settings.device, most)
    with_threads = with_changes(settings, {"device.threads": threads})
    options: dict[str, Any] = {
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
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
    return replica.options(**options).bind(with_threads.model_dump(), tuple(keys))


def replica_resources(options: DeviceSettings, most: int) -> tuple[int, int]:
    """Return the threads and the GPUs of a replica; all replicas share the nodes' cores."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    device = options.device
    gpus = sum(resources.get("GPU", 0) for resources in nodes)
    if device == "cuda" and not gpus and is_embedded():
        raise UserError("--device=cuda: Ray finds no GPU here; use --device=cpu")
    if device == "cuda" or (device == "auto" and gpus):
        return options.threads or 1, 1
    cores = sorted(int(resources.get("CPU", 0)) for resources in nodes)
    cores = [count for count in cores if count] or [1]
    beside = math.ceil(most / len(cores))
    return options.threads or threads_asked() or max(1, cores[0] // beside), 0


def application(args: dict[str, Any]) -> Any:
    """Build the application of a Serve config, whose `args` are settings by their names."""
    flags = [f"--{key}={value}" for key, value in args.items()]
    return deployment(*check(resolve(ServeSettings, [], flags)))
