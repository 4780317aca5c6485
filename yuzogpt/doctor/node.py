"""What a node knows of itself: versions, room, load, clock, devices, the way out to the others.

In: nothing, or a directory that all nodes share. Out: facts, of plain types. Runs on every node.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

from yuzogpt.errors import UserError, reason_of
from yuzogpt.filesystems import is_store_error, open_filesystem
from yuzogpt.network import interface_of

COMPARED = ("torch", "ray", "numpy", "pyarrow", "tiktoken")  # what a run's bits or protocol hang on
CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # users' own
FOLDER = ".yuzogpt-doctor"


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi sees it."""

    name: str
    memory: int  # bytes; 0: it does not say
    used: int  # bytes
    busy: float | None  # percent; None: it does not say
    errors: int | None  # of memory, not corrected, since it was reset; None: it does not count them


@dataclass(frozen=True)
class Node:
    """The facts of one node."""

    address: str
    versions: dict[str, str]
    cores: int
    load: float  # processes that want a core, last minute
    memory: int  # bytes free
    temporary: int  # bytes free where Ray keeps its files
    interface: str  # that has `address`; empty: none has
    interfaces: list[str]
    choices: dict[str, str]  # network settings that the user made
    gpus: list[Gpu] = field(default_factory=list)
    counted_gpus: int = 0  # that Ray has work for


def examine(address: str, directory: str, counted_gpus: int) -> Node:
    """Return the facts of this node, which others reach at `address`; `directory`: Ray's own."""
    return Node(
        address=address,
        versions=versions(),
        cores=os.cpu_count() or 1,
        load=os.getloadavg()[0],
        memory=psutil.virtual_memory().available,
        temporary=shutil.disk_usage(directory).free,
        interface=interface_of(address) or "",
        interfaces=list(psutil.net_if_addrs()),
        choices={name: os.environ[name] for name in CHOICES if name in os.environ},
        gpus=gpus(),
        counted_gpus=counted_gpus,
    )


def versions() -> dict[str, str]:
    """Return what must agree between nodes."""
    found = {"python": platform.python_version()}
    for name in COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            # Without +cpu or +cu128: a head without GPUs may have another build than the workers.
            found[name] = metadata.version(name).partition("+")[0]
    import torch

    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if driver := ask_nvidia("driver_version"):
        found["driver"] = driver[0][0]
    return found


def gpus() -> list[Gpu]:
    """Return this node's GPUs; none where nvidia-smi is not there."""
    fields = "name,memory.total,memory.used,utilization.gpu,ecc.errors.uncorrected.volatile.total"
    return [
        Gpu(
            name=name,
            memory=int(number(memory) or 0) * 2**20,
            used=int(number(used) or 0) * 2**20,
            busy=number(busy),
            errors=None if number(errors) is None else int(number(errors) or 0),
        )
        for name, memory, used, busy, errors in ask_nvidia(fields)
    ]


def ask_nvidia(fields: str) -> list[list[str]]:
    """Return what nvidia-smi says of each GPU; nothing if it is not there or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return [[value.strip() for value in line.split(",")] for line in text.stdout.splitlines()]
    return []


def number(text: str) -> float | None:
    """Return a number; None for what nvidia-smi writes where there is none, such as [N/A]."""
    try:
        return float(text)
    except ValueError:
        return None


# --- shared storage


@dataclass(frozen=True)
class Storage:
    """How one node does with the storage that all share."""

    written: float | None = None  # bytes a second, durably; None: not measured
    free: int | None = None  # bytes; None: the store does not say
    problem: str = ""


def write_mark(storage: str, trial: str, name: str) -> Storage:
    """Leave a mark in `storage`, for the others to find."""
    try:
        return Storage(free=write(storage, trial, name, b"here"))
    except Exception as error:
        return Storage(problem=why_not(error))


def measure_storage(storage: str, trial: str, name: str, size: int) -> Storage:
    """Write a file of `size` bytes to `storage`, and take the time."""
    content = os.urandom(size)
    began = time.perf_counter()
    try:
        free = write(storage, trial, f"{name}.trial", content)
    except Exception as error:
        return Storage(problem=why_not(error))
    return Storage(size / (time.perf_counter() - began), free)


def write(storage: str, trial: str, name: str, content: bytes) -> int | None:
    """Write a file, durably; return how many bytes are free then, if the storage says it."""
    filesystem, inside = open_filesystem(f"{storage}/{FOLDER}-{trial}/{name}")
    is_local = Path(inside).is_absolute()
    if is_local:  # and not made where nothing is mounted; a store has no directories
        Path(inside).parent.mkdir(exist_ok=True)
    with filesystem.open_output_stream(inside) as stream:
        stream.write(content)
    if not is_local:
        return None
    with Path(inside).open("rb") as file:
        os.fsync(file.fileno())
    return shutil.disk_usage(inside).free


def why_not(error: Exception) -> str:
    """Return why the storage cannot be written; any other error goes on."""
    if isinstance(error, (OSError, UserError)) or is_store_error(error):
        return reason_of(error)
    raise error


def marks(storage: str, trial: str) -> list[str]:
    """Return the names of the files that this node finds there, whole or not."""
    with contextlib.suppress(OSError):
        from pyarrow import fs

        filesystem, inside = open_filesystem(f"{storage}/{FOLDER}-{trial}")
        found = filesystem.get_file_info(fs.FileSelector(inside, allow_not_found=True))
        return [info.base_name for info in found if info.is_file]
    return []


def remove_marks(storage: str, trial: str) -> None:
    """Delete the files again."""
    with contextlib.suppress(OSError):
        filesystem, inside = open_filesystem(f"{storage}/{FOLDER}-{trial}")
        filesystem.delete_dir(inside)
