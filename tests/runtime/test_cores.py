"""Cores, threads and memory are those of the container, not of the machine."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, TINY, yuzogpt
from yuzogpt.runtime import cores

GIGABYTE = 2**30
V2 = "25 20 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 25 0:27 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n"
)
UNIFIED = "30 25 0:25 / /sys/fs/cgroup/unified rw shared:8 - cgroup2 cgroup2 rw\n"
NONE = "9223372036854771712"  # what version 1 says where there is no limit


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that writes a system's files, and returns where they are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def write(membership, mounts, files):
        everything = {"proc/self/cgroup": membership, "proc/self/mountinfo": mounts}
        everything |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
        for name, text in everything.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def version_2(path, files, root="/"):
    return f"0::{path}\n", V2.replace(" / ", f" {root} ", 1), files


QUOTAS = {
    "version 2": (version_2("/a", {"a/cpu.max": "200000 100000\n"}), 2.0),
    "half a core": (version_2("/a", {"a/cpu.max": "50000 100000\n"}), 0.5),
    "no limit": (version_2("/a", {"a/cpu.max": "max 100000\n"}), 8.0),
    "more than there is": (version_2("/a", {"a/cpu.max": "6400000 100000\n"}), 8.0),
    "of a group around it": (
        version_2("/a/b/c", {"a/b/c/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}),
        3.0,
    ),
    "the smallest of all": (
        version_2("/a/b", {"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "300000 100000\n"}),
        1.0,
    ),
    "a namespace of its own": (version_2("/", {"cpu.max": "150000 100000\n"}), 1.5),
    "mounted in another namespace": (
        version_2("/", {"cpu.max": "150000 100000\n"}, root="/../.."),
        1.5,
    ),
    "only its own part is mounted": (
        version_2("/docker/12ab", {"cpu.max": "400000 100000\n"}, root="/docker/12ab"),
        4.0,
    ),
    "version 1": (
        (
            "4:memory:/a\n3:cpuacct,cpu:/a\n",
            V1,
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
        ),
        2.5,
    ),
    "version 1 without": (
        (
            "3:cpu,cpuacct:/a\n",
            V1,
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
        ),
        8.0,
    ),
    "both versions": (
        (
            "3:cpu,cpuacct:/a/b\n0::/a/b\n",
            UNIFIED + V1,
            {
                "unified/a/b/cgroup.procs": "1\n",
                "cpu,cpuacct/a/cpu.cfs_quota_us": "100000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
        ),
        1.0,
    ),
    "a blank in a name": (
        ("0::/my pod\n", V2.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/a\040b"),
         {"a b/my pod/cpu.max": "200000 100000\n"}),
        2.0,
    ),
    "nonsense": (version_2("/a", {"a/cpu.max": "a lot\n"}), 8.0),
    "an empty file": (version_2("/a", {"a/cpu.max": ""}), 8.0),
    "a period of zero": (version_2("/a", {"a/cpu.max": "1000 0\n"}), 8.0),
    "lines of another form": (("nonsense\n0::/a\n", "nonsense\n - \n" + V2, {}), 8.0),
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTAS)
def test_the_quota_of_cores(system, name):
    files, expected = QUOTAS[name]
    assert cores.cores_of_time(system(*files)) == expected
    assert cores.available_cores(system(*files)) == max(1, int(expected))


def test_what_cannot_be_read_is_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3})
    assert cores.available_cores(tmp_path / "nothing") == 2
    assert cores.total_memory(tmp_path / "nothing") == psutil.virtual_memory().total
    folder = tmp_path / "proc/self/cgroup"
    folder.mkdir(parents=True)  # not a file
    assert cores.available_cores(tmp_path) == 2


def memory_2(files, path="/a"):
    return version_2(path, {name: f"{value}\n" for name, value in files.items()})


def memory_1(files, path="/a"):
    return f"4:memory:{path}\n", V1, {f"memory/{name}": f"{v}\n" for name, v in files.items()}


MEMORY = {  # files, bytes in all, bytes free
    "version 2": (
        memory_2({"a/memory.max": GIGABYTE, "a/memory.current": GIGABYTE // 4}),
        GIGABYTE,
        GIGABYTE * 3 // 4,
    ),
    "high is a limit too": (
        memory_2({"a/memory.max": GIGABYTE, "a/memory.high": GIGABYTE // 2}),
        GIGABYTE // 2,
        GIGABYTE // 2,
    ),
    "files in memory can go": (
        memory_2(
            {
                "a/memory.max": GIGABYTE,
                "a/memory.current": GIGABYTE,
                "a/memory.stat": f"anon 5\ninactive_file {GIGABYTE // 2}",
            }
        ),
        GIGABYTE,
        GIGABYTE // 2,
    ),
    "of a group around it, with others in it": (
        memory_2(
            {
                "a/b/memory.max": "max",
                "a/b/memory.current": 5,
                "a/memory.max": GIGABYTE,
                "a/memory.current": GIGABYTE,
            },
            "/a/b",
        ),
        GIGABYTE,
        0,
    ),
    "version 1": (
        memory_1(
            {
                "a/memory.limit_in_bytes": GIGABYTE,
                "a/memory.usage_in_bytes": GIGABYTE // 2,
                "a/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIGABYTE // 4}",
            }
        ),
        GIGABYTE,
        GIGABYTE * 3 // 4,
    ),
    "version 1, of a group that is not mounted": (
        memory_1(
            {
                "a/memory.limit_in_bytes": NONE,
                "a/memory.usage_in_bytes": 0,
                "a/memory.stat": f"hierarchical_memory_limit {GIGABYTE}",
            }
        ),
        GIGABYTE,
        GIGABYTE,
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_the_limit_of_memory(system, name):
    files, total, free = MEMORY[name]
    place = system(*files)
    assert cores.total_memory(place) == total
    assert cores.free_memory(place) == free


@pytest.mark.parametrize(
    "files", [memory_2({"a/memory.max": "max"}), memory_1({"a/memory.limit_in_bytes": NONE})]
)
def test_no_limit_of_memory(system, files):
    assert cores.total_memory(system(*files)) == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 0),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "many"}, 0),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 0),  # torchrun's own
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, 2),
        ({"OMP_NUM_THREADS": "4", "RAY_RAYLET_PID": "7"}, 0),  # Ray's, in a worker
        ({"OMP_NUM_THREADS": "1", "RAY_RAYLET_PID": "7", cores.SUBMITTED_JOB: "{}"}, 0),
        ({"OMP_NUM_THREADS": "4", "RAY_RAYLET_PID": "7", cores.SUBMITTED_JOB: "{}"}, 4),
    ],
)
def test_whose_omp_num_threads(monkeypatch, variables, threads):
    for name in (cores.THREADS, cores.TORCHRUN, cores.RAY_WORKER, cores.SUBMITTED_JOB):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cores.threads_asked() == threads
    assert cores.threads_of_each(1) == (threads or cores.available_cores())


@pytest.mark.parametrize(
    ("users", "spins"),
    [
        ({}, cores.SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
        ({"KMP_BLOCKTIME": "0"}, None),
    ],
)
def test_threads_wait_as_the_user_says_or_spin_briefly(users, spins):
    variables = dict(users)
    cores.limit_spinning(variables)
    assert variables == {**users, **({cores.SPIN_COUNT: spins} if spins else {})}


@pytest.mark.parametrize(
    ("mine", "job", "passed_on"),
    [(cores.SPINS, "", True), ("7", "", False), (cores.SPINS, cores.SPIN_COUNT, False)],
)
def test_a_cluster_gets_only_what_the_command_set(monkeypatch, mine, job, passed_on):
    monkeypatch.setenv(cores.SPIN_COUNT, mine)
    monkeypatch.setenv(cores.SUBMITTED_JOB, f'{{"runtime_env": {{"env_vars": "{job}"}}}}')
    assert cores.spin_variables() == ({cores.SPIN_COUNT: cores.SPINS} if passed_on else {})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp on Linux only")
def test_libgomp_reads_the_spin_count(corpus_dir, tmp_path, monkeypatch):
    for name in (cores.SPIN_COUNT, *cores.USERS_POLICIES):
        monkeypatch.delenv(name, raising=False)
    places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path}", "--num_workers=0"]
    result = yuzogpt("train", *TINY, *places, "--max_iters=1", OMP_DISPLAY_ENV="verbose")
    assert f"{cores.SPIN_COUNT} = '{cores.SPINS}'" in result.stderr


CHOICE = """
from yuzogpt.config import DeviceSettings
from yuzogpt.runtime.device import choose_hardware
from yuzogpt.runtime.world import World
print(choose_hardware(DeviceSettings(threads={threads}), World()).threads)
"""


def chosen_threads(threads=0, before=(), **variables):
    environment = {k: v for k, v in os.environ.items() if k != cores.THREADS}
    result = subprocess.run(
        [*before, sys.executable, "-c", CHOICE.format(threads=threads)],
        env={**environment, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return int(result.stdout)


@pytest.mark.slow
def test_omp_num_threads_is_heeded_and_threads_wins():
    assert chosen_threads(OMP_NUM_THREADS="3") == 3
    assert chosen_threads(threads=2, OMP_NUM_THREADS="3") == 2


@contextmanager
def control_group(controller, *names):
    """A file of a new group of this machine's, of the first of `names`; skips where none is."""
    for place in dict.fromkeys(cores.groups(controller, cores.SYSTEM)):
        group = place / f"yuzogpt-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            found = [group / name for name in names if (group / name).exists()]
            if found:
                yield found[0]
                return
        finally:
            group.rmdir()
    pytest.skip(f"no control group with a {controller} controller can be made here")


@pytest.mark.slow
def test_a_real_quota_of_half_a_core_makes_one_thread():
    with control_group("cpu", "cpu.max", "cpu.cfs_quota_us") as quota:
        quota.write_text("50000 100000" if quota.name == "cpu.max" else "50000")
        assert chosen_threads(before=inside(quota.parent)) == 1


def inside(group):
    """What comes before a command that is to run in a group."""
    return "sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"


def test_a_real_limit_of_memory():
    with control_group("memory", "memory.max", "memory.limit_in_bytes") as limit:
        limit.write_text(str(2**29))
        command = "from yuzogpt.runtime.cores import *; print(total_memory(), free_memory())"
        result = subprocess.run(
            [*inside(limit.parent), sys.executable, "-c", command],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        total, free = map(int, result.stdout.split())
    assert total == 2**29
    assert 0 < free < 2**29


def test_nothing_else_counts_cores_or_memory():
    """A quota is forgotten where somebody counts on their own."""
    for path in sorted((REPOSITORY / "yuzogpt").rglob("*.py")):
        if path.name != "cores.py":
            text = path.read_text()
            for name in ("os.cpu_count", "sched_getaffinity", "virtual_memory", "SC_PHYS_PAGES"):
                assert name not in text, f"{path}: {name}"
    assert Path(cores.__file__).name == "cores.py"
