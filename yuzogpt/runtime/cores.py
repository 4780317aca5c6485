"""The cores and the memory that this process may use, within the limits of its container.

Limits come from CPU affinity and from Linux's control groups (cgroups, versions 1 and 2): of the
process's own group and all groups around it, the smallest limit counts. An unreadable limit counts
as none.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

import psutil

from yuzogpt.storage.paths import SUBMITTED_JOB

SYSTEM = Path("/")  # the root of proc/ and of the mounts
THREADS = "OMP_NUM_THREADS"
TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun for its ranks
RAY_WORKER = "RAY_RAYLET_PID"  # set by Ray for its workers, and for a submitted job
SPIN_COUNT = "GOMP_SPINCOUNT"  # read by libgomp once, when torch is imported
SPINS = "1000"  # benchmarks/busy.py
USERS_POLICIES = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")  # they say how threads wait


def available_cores(system: Path = SYSTEM) -> int:
    """Return how many threads or workers can be busy at once: whole cores, at least 1."""
    return max(1, math.floor(cores_of_time(system)))


def cores_of_time(system: Path = SYSTEM) -> float:
    """Return the CPU time that this process may use, in seconds per second."""
    cores = float(len(own_cores()) or os.cpu_count() or 1)
    return min([cores, *(cpu_quota(group) for group in groups("cpu", system))])


def own_cores() -> set[int]:
    """Return the numbers of the cores that this process may run on; none if that is unknown."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def threads_of_each(workers: int) -> int:
    """Return the threads of each of the workers that share this machine's cores.

    OMP_NUM_THREADS takes precedence. `--threads` takes precedence over both: callers check it.
    """
    return threads_asked() or max(1, available_cores() // workers)


def threads_asked() -> int:
    """Return OMP_NUM_THREADS if the user set it, else 0.

    torchrun sets it to 1 in its ranks, Ray in its workers and submitted jobs. Ray's workers take
    the threads that the command's process chose.
    """
    first = os.environ.get(THREADS, "").partition(",")[0].strip()  # "4,2": of nested regions
    if not first.isdecimal():
        return 0
    if RAY_WORKER in os.environ and SUBMITTED_JOB not in os.environ:
        return 0
    is_default = first == "1" and (TORCHRUN in os.environ or SUBMITTED_JOB in os.environ)
    return 0 if is_default else int(first)


def limit_spinning(variables: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's threads spin only briefly while they wait for each other; torch loads later.

    libgomp's own limit lasts milliseconds. On a core that another program shares, a thread that
    spins that long keeps the one that it waits for from running. What the user set stays.
    """
    if not any(name in variables for name in USERS_POLICIES):
        variables.setdefault(SPIN_COUNT, SPINS)


def spin_variables() -> dict[str, str]:
    """Return the variables that `limit_spinning` set, for processes that do not inherit them."""
    is_users = SPIN_COUNT in os.environ.get(SUBMITTED_JOB, "")  # Ray passes these on by itself
    return {SPIN_COUNT: SPINS} if os.environ.get(SPIN_COUNT) == SPINS and not is_users else {}


def total_memory(system: Path = SYSTEM) -> int:
    """Return the memory that this process could use on an idle machine, in bytes."""
    limits = [memory_limit(group) for group in groups("memory", system)]
    return int(min([float(psutil.virtual_memory().total), *limits]))


def free_memory(system: Path = SYSTEM) -> int:
    """Return the memory that this process can still take, in bytes."""
    left = [memory_limit(group) - memory_used(group) for group in groups("memory", system)]
    return int(max(0.0, min([float(psutil.virtual_memory().available), *left])))


# --- control groups


def groups(controller: str, system: Path) -> Iterator[Path]:
    """Yield the mounted directories of this process's group and of the groups around it."""
    paths = dict(paths_of_process(controller, system))
    inside, beside = [], []
    for kind, root, point in mounts(controller, system):
        if kind not in paths:
            continue
        top = system / point.lstrip("/")
        path, start = PurePosixPath(paths[kind]), PurePosixPath(root)
        if path.is_relative_to(start) and ".." not in (*path.parts, *start.parts):
            inside.append((top, path.relative_to(start)))
        else:
            beside.append((top, PurePosixPath()))
    # A mount of another namespace has other paths: its top is then this process's group.
    for top, below in inside or beside:
        yield from (top / part for part in (below, *below.parents))


def paths_of_process(controller: str, system: Path) -> Iterator[tuple[str, str]]:
    """Yield (filesystem type, path) of this process's groups that have a controller."""
    for line in read_lines(system / "proc/self/cgroup"):
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not names:
            yield "cgroup2", path
        elif controller in names.split(","):
            yield "cgroup", path


def mounts(controller: str, system: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (filesystem type, path of the group at its top, mount point): proc(5), mountinfo."""
    for line in read_lines(system / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2" or (kinds[0] == "cgroup" and controller in kinds[2].split(",")):
            yield kinds[0], unescaped(fields[3]), unescaped(fields[4])


def unescaped(field: str) -> str:
    """Return a path of mountinfo, where blanks are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def cpu_quota(group: Path) -> float:
    """Return a group's limit of CPU time, in cores; infinity if there is none."""
    quota, period = [*read_text(group / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota = read_text(group / "cpu.cfs_quota_us")
        period = read_text(group / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
        return int(quota) / int(period)
    return math.inf  # "max", -1, or nothing to read


def throttled_seconds(system: Path = SYSTEM) -> float:
    """Return how long spent quotas have stopped this process's groups so far."""
    found = [0.0]
    for group in groups("cpu", system):
        pairs = (line.partition(" ") for line in read_lines(group / "cpu.stat"))
        values = {name: int(value) for name, _, value in pairs if value.isdecimal()}
        found.append(values.get("throttled_usec", 0) / 1e6 + values.get("throttled_time", 0) / 1e9)
    return max(found)


def memory_limit(group: Path) -> float:
    """Return a group's memory limit in bytes; infinity if there is none.

    memory.high counts as a limit: above it, Linux slows a process down to a standstill.
    """
    limits = [read_text(group / name) for name in ("memory.max", "memory.high")]
    limits.append(read_text(group / "memory.limit_in_bytes"))
    # Version 1 reports here the limits of groups outside the mount.
    limits.append(memory_statistics(group).get("hierarchical_memory_limit", ""))
    return min((float(text) for text in limits if text.isdecimal()), default=math.inf)


def memory_used(group: Path) -> float:
    """Return the memory that a group uses, in bytes, without droppable file cache."""
    used = read_text(group / "memory.current") or read_text(group / "memory.usage_in_bytes")
    statistics = memory_statistics(group)
    cached = statistics.get("total_inactive_file") or statistics.get("inactive_file", "")
    numbers = [float(text) if text.isdecimal() else 0.0 for text in (used, cached)]
    return max(0.0, numbers[0] - numbers[1])


def memory_statistics(group: Path) -> dict[str, str]:
    """Return the entries of a group's memory.stat."""
    pairs = (line.partition(" ") for line in read_lines(group / "memory.stat"))
    return {name: value for name, _, value in pairs}


def read_text(path: Path) -> str:
    """Return a file's text, stripped; an empty string if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return path.read_text().strip()
    return ""


def read_lines(path: Path) -> list[str]:
    """Return a file's lines; none if it cannot be read."""
    return read_text(path).splitlines()
