"""Examines the node that it runs on: versions, memory, disk, load, GPUs, interfaces, storage.

The facts are of plain types, since every node sends its own to the head.
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

COMPARED_PACKAGES = ("torch", "ray", "numpy", "pyarrow", "tiktoken")  # a run's bits depend on them
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # set by users
GPU_FIELDS = (
    "name,memory.total,memory.used,utilization.gpu,ecc.errors.uncorrected.volatile.total,"
    "driver_version"
)
FOLDER = ".yuzogpt-doctor"
MAX_REMARK_LENGTH = 200  # characters

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi sees it."""

    name: str
    memory: int  # bytes; 0: not known
    used: int  # bytes
    busy: float | None  # percent; None: not known
    errors: int | None  # of memory, uncorrected, since its last reset; None: not counted
    driver: str = ""


@dataclass(frozen=True)
class Node:
    """The facts of one node."""

    address: str
    versions: dict[str, str]
    cores: int  # that workers may use: a container may have fewer than its machine
    load: float  # of the machine, the average of the last minute
    memory: int  # bytes free, within a container's limit
    temporary: int  # bytes free where Ray keeps its files
    interface: str  # that has `address`; empty: none
    interfaces: list[str]
    choices: dict[str, str]  # of INTERFACE_VARIABLES
    gpus: list[Gpu] = field(default_factory=list)
    gpu_problem: str = ""  # why nvidia-smi failed
    gpu_remarks: list[str] = field(default_factory=list)  # other lines of nvidia-smi
    usable_gpus: int = 0  # that torch can use
    counted_gpus: int = 0  # that Ray has
    quota: float = 0.0  # CPU time in cores; 0: not known
    machine_cores: int = 0  # 0: not known
    problems: dict[str, str] = field(default_factory=dict)  # part that was not examined: why


def examine(address: str, directory: str, counted_gpus: int) -> Node:
    """Return the facts of this node, which others reach at `address`; `directory`: Ray's own."""
    problems: dict[str, str] = {}

    def part(name: str, find: Callable[[], T], otherwise: T) -> T:
        try:
            return find()
        except Exception as error:  # the other parts are shown all the same
            problems[name] = f"{type(error).__name__}: {first_line(error)}"
            return otherwise

    nothing: tuple[list[Gpu], str, list[str]] = ([], "", [])
    gpus, problem, remarks = part("GPUs", examine_gpus, nothing)
    basic = {"python": platform.python_version()}
    if gpus:
        basic["driver"] = gpus[0].driver
    return Node(
        address=address,
        versions=basic | part("versions", versions, dict[str, str]()),
        cores=part("cores", available_cores, 0),
        quota=part("cores", cores_of_time, 0.0),
        machine_cores=part("cores", lambda: psutil.cpu_count() or 1, 0),
        load=part("load", lambda: os.getloadavg()[0], 0.0),
        memory=part("memory", free_memory, 0),
        temporary=part("disk", lambda: shutil.disk_usage(directory).free, 0),
        interface=part("interfaces", lambda: interface_of(address) or "", ""),
        interfaces=part("interfaces", lambda: list(psutil.net_if_addrs()), []),
        choices={name: os.environ[name] for name in INTERFACE_VARIABLES if name in os.environ},
        gpus=gpus,
        gpu_problem=problem,
        gpu_remarks=remarks,
        usable_gpus=part("GPUs", count_usable_gpus, 0) if gpus else 0,
        counted_gpus=counted_gpus,
        problems=problems,
    )


def versions() -> dict[str, str]:
    """Return the versions that must agree between nodes."""
    by_name = {}
    for name in COMPARED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            # Without +cpu or +cu128: a head without GPUs may have another build than the workers.
            by_name[name] = metadata.version(name).partition("+")[0]
    import torch

    if torch.version.cuda:
        by_name["cuda"] = torch.version.cuda
    return by_name


def examine_gpus() -> tuple[list[Gpu], str, list[str]]:
    """Return this node's GPUs, why nvidia-smi failed if it did, and its other lines."""
    command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except FileNotFoundError:
        return [], "", []
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi does not answer within 10 s", []
    except OSError as error:
        return [], f"nvidia-smi fails: {reason_of(error)}", []
    gpus, remarks = [], []
    for line in (answer.stdout + b"\n" + answer.stderr).decode(errors="replace").splitlines():
        if gpu := read_gpu(line):
            gpus.append(gpu)
        elif line.strip():
            remarks.append(line.strip()[:MAX_REMARK_LENGTH])
    status = answer.returncode  # a remark sets it, too: 14 is a damaged infoROM
    if gpus or not status:
        return gpus, "", remarks
    return [], f"nvidia-smi fails: {remarks[-1] if remarks else f'status {status}'}", []


def read_gpu(line: str) -> Gpu | None:
    """Return the GPU that a line of nvidia-smi describes; None for any other line."""
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
    """Return how many GPUs torch can use, in a process from which Ray hides none."""
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
    """Return a number; None for what nvidia-smi writes instead of one, such as [N/A]."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# --- shared storage


@dataclass(frozen=True)
class Storage:
    """How the shared storage works on one node."""

    written: float | None = None  # bytes per second, synced; None: not measured
    free: int | None = None  # bytes; None: not known
    problem: str = ""


def write_mark(storage: str, trial: str, name: str) -> Storage:
    """Write a mark to `storage`, for the other nodes to find."""
    try:
        return Storage(free=write(storage, trial, name, b"here"))
    except Exception as error:
        return Storage(problem=storage_problem(error))


def measure_storage(storage: str, trial: str, name: str, size: int) -> Storage:
    """Write a file of `size` bytes to `storage` and measure the time."""
    content = os.urandom(size)
    began = time.perf_counter()
    try:
        free = write(storage, trial, f"{name}.trial", content)
    except Exception as error:
        return Storage(problem=storage_problem(error))
    return Storage(size / (time.perf_counter() - began), free)


def write(storage: str, trial: str, name: str, content: bytes) -> int | None:
    """Write and sync a file; return how many bytes are free afterwards, if that is known."""
    filesystem, inside = open_filesystem(f"{storage}/{FOLDER}-{trial}/{name}")
    is_local = Path(inside).is_absolute()
    if is_local:  # its parent is not made, since nothing may be mounted; a store has no directories
        Path(inside).parent.mkdir(exist_ok=True)
    with filesystem.open_output_stream(inside) as stream:
        stream.write(content)
    if not is_local:
        return None
    with Path(inside).open("rb") as file:
        os.fsync(file.fileno())
    return shutil.disk_usage(inside).free


def storage_problem(error: Exception) -> str:
    """Return why the storage cannot be written; raise any other error again."""
    if isinstance(error, (OSError, UserError)) or is_store_error(error):
        return reason_of(error)
    raise error


def marks(storage: str, trial: str) -> tuple[list[str], str]:
    """Return the names of the marks that this node finds, and why it cannot list them if so."""
    try:
        return [info.base_name for info in listing(storage, trial)], ""
    except OSError as error:
        return [], reason_of(error)


def listing(storage: str, trial: str) -> list[Any]:
    """Return the files of a trial."""
    from pyarrow import fs

    filesystem, inside = open_filesystem(f"{storage}/{FOLDER}-{trial}")
    infos = filesystem.get_file_info(fs.FileSelector(inside, allow_not_found=True))
    return [info for info in infos if info.is_file]


def remove_marks(storage: str, trial: str) -> None:
    with contextlib.suppress(OSError):
        filesystem, inside = open_filesystem(f"{storage}/{FOLDER}-{trial}")
        if Path(inside).is_absolute():
            filesystem.delete_dir(inside)
            return
        for info in listing(
            storage, trial
        ):  # in a store, deleting a folder leaves a marker object behind
            filesystem.delete_file(info.path)
