"""Which Ray: the cluster that the user named, or an embedded one that ends with the command.

In: an address, or none. Out: a connection. A cluster that merely happens to run is never joined.
"""

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from yuzogpt.errors import RunFailed, UserError
from yuzogpt.orchestration.causes import cause_of
from yuzogpt.orchestration.lean import ended_at_once, few_processes
from yuzogpt.orchestration.leftovers import PREFIX, end, make_directory, sweep
from yuzogpt.orchestration.stuck import obeyed, workers_watched
from yuzogpt.runtime.cores import free_memory
from yuzogpt.runtime.signals import sigterm_held_back

# Set before ray is imported, for a Ray that has one node and one command.
ONLY_HERE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no node drains here: a process of 3 s less
    "RAY_worker_niceness": "0",  # else Ray's own processes go before the work
    "RAY_prestart_worker_first_driver": "0",  # workers that nobody asks for
    # What is reported to a dashboard, and there is none; in milliseconds, as all that follow.
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    "RAY_metrics_report_interval_ms": "600000",
    "RAY_task_events_report_interval_ms": "0",  # never
    "RAY_report_worker_backlog_interval_ms": "10000",
    # What is looked at several times a second for the sake of other nodes, or of many tasks.
    "RAY_kill_idle_workers_interval_ms": "2000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_io_context_event_loop_lag_collection_interval_ms": "60000",
    "RAY_io_context_monitor_probe_interval_ms": "60000",
}
# Set likewise, whatever the user set for clusters. None: removed.
NEVER_HERE: dict[str, str | None] = {
    # Workers run in this command's environment as it is: started by `uv run`, Ray would make it for
    # each worker again, and a hook might give them another.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_RUNTIME_ENV_HOOK": None,
    # Nobody from elsewhere connects: without clusters, Ray listens on the loopback interface alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",  # its exporter listens on all interfaces
}
# Set before ray is imported, wherever it runs.
QUIET = {
    # A paragraph of advice for each worker that dies; we say so in a line. And that Serve's
    # controller, which ends itself, did not answer before it had ended.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a task"
    "|ServeController.graceful_shutdown failed",
}
ANSWER_WITHIN = 5.0  # seconds
SHARED_MEMORY = "/dev/shm"
OBJECT_STORE_BYTES = 100 * 2**20  # training hands nothing through the object store


@contextlib.contextmanager
def connected(
    address: str, cores: int, heavy_imports: Sequence[str] = (), library: str = "ray"
) -> Iterator[None]:
    """Join the Ray cluster at `address` or RAY_ADDRESS, or start an embedded one with `cores`.

    `heavy_imports` are imported meanwhile, in a thread. Modules of ray's must not be among them:
    two threads that import one package from two ends may each see the half of it. `library` is
    the one that the caller uses (ray.train, ray.data): it is imported here, for the caller.
    """
    address = address or os.environ.get("RAY_ADDRESS", "")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with contextlib.ExitStack() as stack:
        with (
            sigterm_held_back(),
            interruption_held_back() as interruptions,
            obeyed(interruptions, lambda: private_directory() if is_embedded() else None),
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
    refuse_unreachable(address)
    import ray
    from ray.exceptions import RayError

    try:
        connect(address=address)
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


def refuse_unreachable(address: str) -> None:
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
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_WITHIN).close()
    except OSError as error:
        raise UserError(
            f"--ray_address={address}: no Ray cluster could be joined there "
            f"({error.strerror or error}); leave it out, and unset RAY_ADDRESS, to start one here"
        ) from None


@contextlib.contextmanager
def embedded(cores: int) -> Iterator[None]:
    """Start a Ray of this command's own: private directory, private token, no dashboard."""
    sweep()
    directory = make_directory()
    try:
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        chosen = {name: os.environ.get(name, value) for name, value in ONLY_HERE.items()}
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        with environment(chosen | access | importable_checkout() | NEVER_HERE):
            try:
                with few_processes(), sigterm_held_back():  # which Ray's processes inherit
                    start(cores, directory)
                with workers_watched(directory):
                    yield
            finally:
                if "ray" in sys.modules:  # else it was interrupted before
                    with deaf_to_interruption(), ended_at_once():
                        sys.modules["ray"].shutdown()
    finally:
        with deaf_to_interruption():
            end(directory)


def start(cores: int, directory: Path) -> None:
    """Start a Ray of one node, with its files in a directory; RunFailed if it cannot be."""
    try:
        connect(
            address="local",
            num_cpus=cores,
            runtime_env=runtime_environment(),
            include_dashboard=False,
            _memory=free_memory(),
            object_store_memory=OBJECT_STORE_BYTES,
            _plasma_directory=plasma_directory(directory),
            _temp_dir=str(directory / "ray"),  # not `directory`: Ray opens its own to all
        )
    except Exception as error:  # of many types, from a lack of memory to one of descriptors
        raise RunFailed(f"Ray cannot be started here: {cause_of(error)}") from None


def runtime_environment() -> dict[str, str] | None:
    """Return what Ray must know of this Python: it is put into a shell's line as it is given."""
    quoted = shlex.quote(sys.executable)
    return None if quoted == sys.executable else {"py_executable": quoted}


def plasma_directory(directory: Path) -> str | None:
    """Return where the object store is, if it does not fit where Ray puts it by itself.

    Ray would do the same, and write a paragraph on a performance that does not depend on it here.
    """
    with contextlib.suppress(OSError):
        if shutil.disk_usage(SHARED_MEMORY).free >= OBJECT_STORE_BYTES:
            return None
    return str(directory)


def is_embedded() -> bool:
    """Tell whether the Ray of this process was started by one command, for itself."""
    return private_directory().name.startswith(PREFIX)


def private_directory() -> Path:
    """Return where an embedded Ray has its token: its processes inherit the path."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "")).parent


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of this process, and of those it starts; afterwards they are as before."""
    before = {name: os.environ.get(name) for name in values}
    set_variables(values)
    try:
        yield
    finally:
        set_variables(before)


def set_variables(values: Mapping[str, str | None]) -> None:
    """Set variables of this process; remove those whose value is None."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def importable_checkout() -> dict[str, str]:
    """Return what lets Ray's processes import this package where it runs without installation.

    They begin elsewhere: `python -m yuzogpt` in a clone finds it in its own directory only.
    """
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return {}
    paths = (os.environ.get("PYTHONPATH", ""), str(root))
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def connect(**options: Any) -> None:
    """Call `ray.init`, and keep what this command does on SIGTERM: Ray sets its own handler."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level="WARNING", **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def interruption_held_back() -> Iterator[list[int]]:
    """Let Ctrl-C come at the end; a second one at once. Yields what came so far.

    In the middle of Ray's import or start it may be raised where compiled code drops it, with a
    lock that is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    seen: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


@contextlib.contextmanager
def deaf_to_interruption() -> Iterator[None]:
    """Ignore Ctrl-C while what was begun is ended, which takes a moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def cores_of_nodes() -> list[int]:
    """Return how many cores each node has that has any."""
    import ray

    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [int(resources["CPU"]) for resources in alive if resources.get("CPU", 0) >= 1]
