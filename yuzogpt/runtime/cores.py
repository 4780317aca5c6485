"""How many cores and how much memory this process may use, limits of its container included.

In: affinity, and the limits of control groups (Linux's cgroups, versions 1 and 2). Out: cores,
threads and bytes. A process has the limits of its own group and of all groups around it: the
smallest counts. What cannot be read is no limit.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

from yuzogpt.storage.paths import SUBMITTED_JOB

SYSTEM = Path("/")  # where proc/ and the groups are found
THREADS = "OMP_NUM_THREADS"
TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun for its ranks
RAY_WORKER = "RAY_RAYLET_PID"  # set by Ray for its workers, and for a submitted job


def available_cores(system: Path = SYSTEM) -> int:
    """Return how many threads or workers can be busy all the time: whole cores, at least 1."""
    return max(1, math.floor(cores_of_time(system)))


def cores_of_time(system: Path = SYSTEM) -> float:
    """Return how many seconds of CPU time this process may use in a second."""
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    else:
        cores = float(os.cpu_count() or 1)
    return min([cores, *(quota_of(group) for group in groups("cpu", system))])


def threads_of_each(workers: int) -> int:
    """Return the threads of each of the workers that share this machine's cores.

    OMP_NUM_THREADS comes first. A setting of ours (`--threads`) comes before both: callers see to
    that.
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


def total_memory(system: Path = SYSTEM) -> int:
    """Return how many bytes of memory this process could have if nobody else had any."""
    limits = [memory_limit_of(group) for group in groups("memory", system)]
    return int(min([float(psutil.virtual_memory().total), *limits]))


def free_memory(system: Path = SYSTEM) -> int:
    """Return how many bytes of memory this process can still take."""
    left = [memory_limit_of(group) - memory_used_in(group) for group in groups("memory", system)]
    return int(max(0.0, min([float(psutil.virtual_memory().available), *left])))


# --- control groups


def groups(controller: str, system: Path) -> Iterator[Path]:
    """Yield the directories of this process's group and of those around it, as far as mounted."""
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
    # Where the mount was made in another namespace, its path is not ours: its top is our group.
    for top, below in inside or beside:
        yield from (top / part for part in (below, *below.parents))


def paths_of_process(controller: str, system: Path) -> Iterator[tuple[str, str]]:
    """Yield (filesystem type, path) of this process's groups that may limit what is named."""
    for line in lines_of(system / "proc/self/cgroup"):
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not names:
            yield "cgroup2", path
        elif controller in names.split(","):
            yield "cgroup", path


def mounts(controller: str, system: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (filesystem type, path of the group at its top, mount point): proc(5), mountinfo."""
    for line in lines_of(system / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2" or (kinds[0] == "cgroup" and controller in kinds[2].split(",")):
            yield kinds[0], unescaped(fields[3]), unescaped(fields[4])


def unescaped(field: str) -> str:
    """Return a path of mountinfo, where blanks are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def quota_of(group: Path) -> float:
    """Return a group's limit of CPU time, in cores; infinity if it has none."""
    quota, period = [*text_of(group / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota = text_of(group / "cpu.cfs_quota_us")
        period = text_of(group / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
        return int(quota) / int(period)
    return math.inf  # "max", -1, or nothing to read


def memory_limit_of(group: Path) -> float:
    """Return a group's limit of memory in bytes; infinity if it has none.

    Above memory.high a process is slowed down until nothing moves.
    """
    found = [text_of(group / name) for name in ("memory.max", "memory.high")]
    found.append(text_of(group / "memory.limit_in_bytes"))
    # Version 1 also says what groups allow that are around the mount's top.
    found.append(statistics_of(group).get("hierarchical_memory_limit", ""))
    return min((float(text) for text in found if text.isdecimal()), default=math.inf)


def memory_used_in(group: Path) -> float:
    """Return the bytes that a group has in use, without files that the system can drop."""
    used = text_of(group / "memory.current") or text_of(group / "memory.usage_in_bytes")
    known = statistics_of(group)
    dropped = known.get("total_inactive_file") or known.get("inactive_file", "")
    numbers = [float(text) if text.isdecimal() else 0.0 for text in (used, dropped)]
    return max(0.0, numbers[0] - numbers[1])


def statistics_of(group: Path) -> dict[str, str]:
    """Return what a group's memory.stat says."""
    pairs = (line.partition(" ") for line in lines_of(group / "memory.stat"))
    return {name: value for name, _, value in pairs}


def text_of(path: Path) -> str:
    """Return a file's text without its end; nothing if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return path.read_text().strip()
    return ""


def lines_of(path: Path) -> list[str]:
    """Return a file's lines; none if it cannot be read."""
    return text_of(path).splitlines()
