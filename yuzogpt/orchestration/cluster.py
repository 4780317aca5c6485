"""Which Ray: the cluster that the user named, or an embedded one that ends with the command.

A cluster that merely happens to run is never joined.
"""

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module

from yuzogpt.errors import UserError
from yuzogpt.orchestration.embedded import connect, embedded, is_embedded, private_directory
from yuzogpt.orchestration.environment import EVERYWHERE, cluster_address, set_defaults
from yuzogpt.orchestration.stuck import end_if_stuck
from yuzogpt.runtime.cores import spin_variables
from yuzogpt.runtime.signals import interruption_held_back, sigterm_held_back

CONNECT_TIMEOUT_S = 5.0


@contextlib.contextmanager
def connected(
    address: str, cores: int, heavy_imports: Sequence[str] = (), library: str = "ray"
) -> Iterator[None]:
    """Join the Ray cluster at `address` or RAY_ADDRESS, or start an embedded one with `cores`.

    A program that called `ray.init` itself is connected already, and stays so.

    `heavy_imports` are imported meanwhile, in a thread. No module of ray's may be among them: two
    threads that import one package from two ends may each see half of it. `library` is the one
    that the caller uses (ray.train, ray.data), imported here.
    """
    if not address and "ray" in sys.modules and sys.modules["ray"].is_initialized():
        import_module(library)
        yield
        return
    address = cluster_address(address)
    set_defaults(EVERYWHERE)
    with contextlib.ExitStack() as stack:
        with (
            sigterm_held_back(),
            interruption_held_back() as interruptions,
            end_if_stuck(interruptions, lambda: private_directory() if is_embedded() else None),
        ):
            importing = threading.Thread(
                target=lambda: [import_module(name) for name in heavy_imports], daemon=True
            )
            importing.start()
            stack.enter_context(joined(address) if address else embedded(cores))
            import_module(library)
            importing.join()
        yield


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Join a running cluster, and leave it running."""
    check_reachable(address)
    import ray
    from ray.exceptions import RayError

    try:
        connect(address=address, runtime_env={"env_vars": spin_variables()})
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--ray_address={address}: no Ray cluster could be joined there ({reason}); if it asks "
            "for a token: RAY_AUTH_MODE=token, and the token in ~/.ray/auth_token; to start a Ray "
            "here, leave it out, and unset RAY_ADDRESS"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raise UserError if nobody listens at HOST:PORT: Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise UserError(
            f"--ray_address={address}: Ray's client protocol holds no run; `ray job submit` from "
            "outside of the cluster, or the head's HOST:6379 on one of its nodes"
        )
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--ray_address={address}: give HOST:PORT; a head's port is 6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"--ray_address={address}: no Ray cluster could be joined there "
            f"({error.strerror or error}); leave it out, and unset RAY_ADDRESS, to start one here"
        ) from None


def cores_of_nodes() -> list[int]:
    """Return the number of cores of each node that has any."""
    import ray

    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [int(resources["CPU"]) for resources in alive if resources.get("CPU", 0) >= 1]
