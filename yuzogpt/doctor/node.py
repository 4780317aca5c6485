"""What a node knows of itself: versions, room, load, clock, devices, the way out to the others.

In: nothing, or a directory that all nodes share. Out: facts, of plain types. Runs on every node.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from yuzogpt.errors import UserError, first_line, reason_of
from yuzogpt.filesystems import is_store_error, open_filesystem
from yuzogpt.network import interface_of

COMPARED = ("torch", "ray", "numpy", "pyarrow", "tiktoken")  # what a run's bits or protocol hang on
CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # users' own
GPU_FIELDS = (
    "name,memory.total,memory.used,utilization.gpu,ecc.errors.uncorrected.volatile.total,"
    "driver_version"
)
FOLDER = ".yuzogpt-doctor"


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi sees it."""

    name: str
    memory: int  # bytes; 0: it does not say
    used: int  # bytes
    busy: float | None  # percent; None: it does not say
    errors: int | None  # of memory, not corrected, since it was reset; None: it does not count them
    driver: str = ""


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
    gpu_problem: str = ""  # why they cannot be told
    usable_gpus: int = 0  # that torch can use
    counted_gpus: int = 0  # that Ray has work for


def examine(address: str, directory: str, counted_gpus: int) -> Node:
    """Return the facts of this node, which others reach at `address`; `directory`: Ray's own."""
    gpus, problem = examine_gpus()
    return Node(
        address=address,
        versions=versions() | ({"driver": gpus[0].driver} if gpus else {}),
        cores=os.cpu_count() or 1,
        load=os.getloadavg()[0],
        memory=psutil.virtual_memory().available,
        temporary=shutil.disk_usage(directory).free,
        interface=interface_of(address) or "",
        interfaces=list(psutil.net_if_addrs()),
        choices={name: os.environ[name] for name in CHOICES if name in os.environ},
        gpus=gpus,
        gpu_problem=problem,
        usable_gpus=count_usable_gpus() if gpus else 0,
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
    return found


def examine_gpus() -> tuple[list[Gpu], str]:
    """Return this node's GPUs, and why they cannot be told, if they cannot."""
    fields = "name,memory.total,memory.used,utilization.gpu,ecc.errors.uncorrected.volatile.total"
    command = [
        "nvidia-smi",
        f"--query-gpu={fields},driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except FileNotFoundError:
        return [], ""
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi does not answer within 10 s"
    except (OSError, subprocess.SubprocessError) as error:
        return [], f"nvidia-smi fails: {first_line(error)}"
    found = []
    for line in answer.stdout.splitlines():
        name, memory, used, busy, errors, driver = (value.strip() for value in line.split(","))
        found.append(
            Gpu(
                name=name,
                memory=int(number(memory) or 0) * 2**20,
                used=int(number(used) or 0) * 2**20,
                busy=number(busy),
                errors=None if number(errors) is None else int(number(errors) or 0),
                driver=driver,
            )
        )
    return found, ""


def count_usable_gpus() -> int:
    """Return how many GPUs torch can use: in a process that Ray does not hide them from."""
    count = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    unhidden = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        answer = subprocess.run(
            [sys.executable, "-c", count],
            capture_output=True,
            text=True,
            timeout=25,
            check=True,
            env=unhidden,
        )
        return int(answer.stdout)
    return 0


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


def marks(storage: str, trial: str) -> tuple[list[str], str]:
    """Return the names of the files that this node finds there, and why it cannot, if so."""
    try:
        return [info.base_name for info in listing(storage, trial)], ""
    except OSError as error:
        return [], reason_of(error)


def listing(storage: str, trial: str) -> list[Any]:
    """Return the files of a trial."""
    from pyarrow import fs

    filesystem, inside = open_filesystem(f"{storage}/{FOLDER}-{trial}")
    found = filesystem.get_file_info(fs.FileSelector(inside, allow_not_found=True))
    return [info for info in found if info.is_file]


def remove_marks(storage: str, trial: str) -> None:
    """Delete the files again."""
    with contextlib.suppress(OSError):
        filesystem, inside = open_filesystem(f"{storage}/{FOLDER}-{trial}")
        if Path(inside).is_absolute():
            filesystem.delete_dir(inside)
            return
        for info in listing(storage, trial):  # a store's folder would leave its mark behind
            filesystem.delete_file(info.path)
