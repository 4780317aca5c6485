"""A Ray of one command: it starts with it, is private to it, and leaves no process and no file."""

import contextlib
import functools
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yuzogpt.errors import RunFailed
from yuzogpt.orchestration.causes import cause_of
from yuzogpt.orchestration.environment import (
    AUTH_MODE,
    EMBEDDED,
    EMBEDDED_ALWAYS,
    TOKEN_PATH,
    environment,
)
from yuzogpt.orchestration.leftovers import PREFIX, end, make_directory, sweep
from yuzogpt.orchestration.ray_internals import (
    init_options,
    kill_node_immediately,
    minimal_node_services,
    read_authentication_again,
)
from yuzogpt.orchestration.stuck import watch_for_workers
from yuzogpt.runtime.cores import free_memory
from yuzogpt.runtime.signals import (
    ctrl_c_ignored,
    sigterm_handler_kept,
    sigterm_held_back,
)

SHARED_MEMORY = "/dev/shm"
OBJECT_STORE_BYTES = 100 * 2**20  # training hands nothing through the object store


@contextlib.contextmanager
def embedded(cores: int) -> Iterator[None]:
    """Start a Ray of this command's own: private directory, private token, no dashboard."""
    sweep()
    directory, was_imported = make_directory(), "ray" in sys.modules
    try:
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(token_of_process())
        chosen = {name: os.environ.get(name, value) for name, value in EMBEDDED.items()}
        access = {AUTH_MODE: "token", TOKEN_PATH: str(token)}
        with environment(chosen | access | importable_checkout() | EMBEDDED_ALWAYS):
            try:
                if was_imported:
                    read_authentication_again()
                with minimal_node_services(), sigterm_held_back():  # which Ray's processes inherit
                    start(cores, directory)
                with watch_for_workers(directory):
                    yield
            finally:
                if "ray" in sys.modules:  # else it was interrupted before
                    with ctrl_c_ignored(), kill_node_immediately():
                        sys.modules["ray"].shutdown()
    finally:
        with ctrl_c_ignored():
            if was_imported:  # by a program that may start a Ray of its own afterwards
                read_authentication_again()
            end(directory)


@functools.cache
def token_of_process() -> str:
    """Return the token of all Rays that this process starts: Ray reads it only once."""
    return secrets.token_hex(32)


def start(cores: int, directory: Path) -> None:
    """Start a Ray of one node, with its files in a directory; RunFailed if it cannot be."""
    try:
        connect(
            address="local",
            num_cpus=cores,
            runtime_env=runtime_environment(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **init_options(
                _memory=free_memory(),
                _plasma_directory=plasma_directory(directory),
                _temp_dir=str(directory / "ray"),  # not `directory`: Ray opens its own to all
            ),
        )
    except Exception as error:  # of many types, from a lack of memory to one of descriptors
        raise RunFailed(f"Ray cannot be started here: {cause_of(error)}") from None


def runtime_environment() -> dict[str, str] | None:
    """Return how Ray finds this Python: it puts the path into a shell command as it is."""
    quoted = shlex.quote(sys.executable)
    return None if quoted == sys.executable else {"py_executable": quoted}


def plasma_directory(directory: Path) -> str | None:
    """Return where the object store is, if it does not fit where Ray puts it by itself.

    Ray would do the same, and warn at length of a slowness that does not matter here.
    """
    with contextlib.suppress(OSError):
        if shutil.disk_usage(SHARED_MEMORY).free >= OBJECT_STORE_BYTES:
            return None
    return str(directory)


def is_embedded() -> bool:
    """Return whether the Ray of this process was started by one command, for itself."""
    return private_directory().name.startswith(PREFIX)


def private_directory() -> Path:
    """Return the directory of an embedded Ray's token, whose path its processes inherit."""
    return Path(os.environ.get(TOKEN_PATH, "")).parent


def importable_checkout() -> dict[str, str]:
    """Return what lets Ray's processes import this package where it runs without installation.

    They start in other directories; `python -m yuzogpt` in a clone finds it in its own alone.
    """
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return {}
    paths = (os.environ.get("PYTHONPATH", ""), str(root))
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def connect(**options: Any) -> None:
    """Call `ray.init`, and keep what this command does on SIGTERM: Ray sets its own handler."""
    import ray

    with sigterm_handler_kept():
        ray.init(log_to_driver=False, logging_level="WARNING", **options)
