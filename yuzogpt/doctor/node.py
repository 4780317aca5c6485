"""What a node knows of itself: versions, room, load, clock, devices, the way out to the others.

In: nothing, or a directory that all nodes share. Out: facts, of plain types. Runs on every node.
"""

import contextlib
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import psutil

from yuzogpt.errors import UserError, first_line, reason_of
from yuzogpt.runtime.cores import available_cores, cores_of_time, free_memory
from yuzogpt.runtime.network import interface_of
from yuzogpt.storage.filesystems import is_store_error, open_filesystem

COMPARED = ("torch", "ray", "numpy", "pyarrow", "tiktoken")  # what a run's bits or protocol hang on
CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # users' own
GPU_FIELDS = (
    "name,memory.total,memory.used,utilization.gpu,ecc.errors.uncorrected.volatile.total,"
    "driver_version"
)
FOLDER = ".yuzogpt-doctor"
LONGEST_REMARK = 200  # characters

T = TypeVar("T")


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
    cores: int  # that workers may use: a container has less than its machine
    load: float  # processes of the machine that want a core, last minute
    memory: int  # bytes free, within a container's limit
    temporary: int  # bytes free where Ray keeps its files
    interface: str  # that has `address`; empty: none has
    interfaces: list[str]
    choices: dict[str, str]  # network settings that the user made
    gpus: list[Gpu] = field(default_factory=list)
    gpu_problem: str = ""  # why they cannot be told
    gpu_remarks: list[str] = field(default_factory=list)  # what nvidia-smi says besides
    usable_gpus: int = 0  # that torch can use
    counted_gpus: int = 0  # that Ray has work for
    quota: float = 0.0  # cores' worth of CPU time; 0: not known
    machine_cores: int = 0  # 0: not known
    problems: dict[str, str] = field(default_factory=dict)  # part that was not found out: why


def examine(address: str, directory: str, counted_gpus: int) -> Node:
    """Return the facts of this node, which others reach at `address`; `directory`: Ray's own."""
    problems: dict[str, str] = {}

    def part(name: str, find: Callable[[], T], otherwise: T) -> T:
        try:
            return find()
        except Exception as error:  # one part's; the others are shown all the same
            problems[name] = f"{type(error).__name__}: {first_line(error)}"
            return otherwise

    nothing: tuple[list[Gpu], str, list[str]] = ([], "", [])
    gpus, problem, remarks = part("GPUs", examine_gpus, nothing)
    found = {"python": platform.python_version()}
    if gpus:
        found["driver"] = gpus[0].driver
    return Node(
        address=address,
        versions=found | part("versions", versions, dict[str, str]()),
        cores=part("cores", available_cores, 0),
        quota=part("cores", cores_of_time, 0.0),
        machine_cores=part("cores", lambda: psutil.cpu_count() or 1, 0),
        load=part("load", lambda: os.getloadavg()[0], 0.0),
        memory=part("memory", free_memory, 0),
        temporary=part("disk", lambda: shutil.disk_usage(directory).free, 0),
        interface=part("interfaces", lambda: interface_of(address) or "", ""),
        interfaces=part("interfaces", lambda: list(psutil.net_if_addrs()), []),
        choices={name: os.environ[name] for name in CHOICES if name in os.environ},
        gpus=gpus,
        gpu_problem=problem,
        gpu_remarks=remarks,
        usable_gpus=part("GPUs", count_usable_gpus, 0) if gpus else 0,
        counted_gpus=counted_gpus,
        problems=problems,
    )


def versions() -> dict[str, str]:
    """Return what must agree between nodes."""
    found = {}
    for name in COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            # Without +cpu or +cu128: a head without GPUs may have another build than the workers.
            found[name] = metadata.version(name).partition("+")[0]
    import torch

    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def examine_gpus() -> tuple[list[Gpu], str, list[str]]:
    """Return this node's GPUs; why they cannot be told, if so; what nvidia-smi says besides."""
    command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except FileNotFoundError:
        return [], "", []
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi does not answer within 10 s", []
    except OSError as error:
        return [], f"nvidia-smi fails: {reason_of(error)}", []
    found, remarks = [], []
    for line in (answer.stdout + b"\n" + answer.stderr).decode(errors="replace").splitlines():
        if gpu := read_gpu(line):
            found.append(gpu)
        elif line.strip():
            remarks.append(line.strip()[:LONGEST_REMARK])
    status = answer.returncode  # not 0 for a remark, too: 14 is a damaged infoROM
    if found or not status:
        return found, "", remarks
    return [], f"nvidia-smi fails: {remarks[-1] if remarks else f'status {status}'}", []


def read_gpu(line: str) -> Gpu | None:
    """Return the GPU that a line of nvidia-smi's is about; None for any other line."""
    values = [value.strip() for value in line.split(",")]
    if len(values) != GPU_FIELDS.count(",") + 1:
        return None
    name, memory, used, busy, errors, driver = values
    if any(number(value) is None and value[:1] != "[" for value in values[1:5]):  # [N/A]
        return None
    uncorrected = number(errors)
    return Gpu(
        name=name,
        memory=int(number(memory) or 0) * 2**20,
        used=int(number(used) or 0) * 2**20,
        busy=number(busy),
        errors=None if uncorrected is None else int(uncorrected),
        driver=driver,
    )


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
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


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
