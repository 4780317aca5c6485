"""Ray Data: the same bytes from any number of workers, through kills, and spread over nodes."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, yuzogpt
from tests.data.text_sources import make_documents, write_jsonl, write_parquet
from yuzogpt.data.blocks import MANIFEST, STAGING

pytestmark = pytest.mark.slow

FILES = 40
FLAGS = ("prepare", "mine", "--tokenizer=gpt2", "--split_rule=nanogpt", "--val_fraction=0.01")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Forty files of parquet, half a second of tokenizing each."""
    documents = make_documents(8_000, characters=8_000)
    return write_parquet(tmp_path_factory.mktemp("source"), documents, files=FILES)


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """The manifest that this process makes, without Ray."""
    directory = tmp_path_factory.mktemp("reference") / "corpus"
    result = yuzogpt(*FLAGS, f"--source={source}", f"--data_dir={directory}", "--num_workers=0")
    assert result.returncode == 0, result.stderr
    return (directory / MANIFEST).read_bytes()


def start(source: Path, directory: Path, workers: int) -> "subprocess.Popen[str]":
    """Start a preparation on an embedded Ray."""
    flags = [*FLAGS, f"--source={source}", f"--data_dir={directory}", f"--num_workers={workers}"]
    return subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", *flags],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_units(directory: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Wait until so many units are done."""
    wait = threading.Event()
    while len(list((directory / STAGING).glob("unit-*.json"))) < count:
        assert process.poll() is None, process.communicate()
        wait.wait(0.01)


def kill_a_task(process: "subprocess.Popen[str]") -> None:
    """Send SIGKILL to a worker of Ray Data in the middle of a unit."""
    wait = threading.Event()
    while True:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.cmdline()[0].startswith("ray::ReadUnitSource"):
                    child.kill()
                    return
        wait.wait(0.01)


def test_a_killed_worker_and_a_killed_driver_leave_the_same_bytes(source, reference, tmp_path):
    process = start(source, tmp_path / "corpus", workers=2)
    wait_for_units(tmp_path / "corpus", 4, process)
    kill_a_task(process)
    wait_for_units(tmp_path / "corpus", 12, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "corpus" / MANIFEST).exists()
    again = start(source, tmp_path / "corpus", workers=1)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    (line,) = [line for line in output.splitlines() if line.startswith("resuming: ")]
    done = int(line.split()[1])
    assert 12 <= done < FILES
    assert line == f"resuming: {done} of {FILES} units are done"
    assert (tmp_path / "corpus" / MANIFEST).read_bytes() == reference
    assert "tokens/s" in output
    assert "0 rejected" in output
    assert errors == ""


def test_a_killed_worker_is_replaced(source, reference, tmp_path):
    process = start(source, tmp_path / "corpus", workers=2)
    wait_for_units(tmp_path / "corpus", 4, process)
    kill_a_task(process)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "corpus" / MANIFEST).read_bytes() == reference
    stats = (tmp_path / "corpus" / "ray-data-stats.txt").read_text()
    assert f"ReadUnitSource: {FILES} tasks" in stats


# In a process of its own: what Ray knows of authentication, it learns once a process.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
cluster = Cluster(True, head_node_args={**options, "temp_dir": sys.argv[1]})
cluster.add_node(**options)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def two_nodes():
    """A Ray cluster of two nodes on this machine; yields its address."""
    with tempfile.TemporaryDirectory(prefix="yuzogpt-test-", dir="/tmp") as directory:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, directory],
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout
        yield process.stdout.readline().strip()
        process.communicate(timeout=60)


def test_work_spreads_over_nodes_and_a_damaged_file_is_one_line(
    two_nodes, reference, source, tmp_path
):
    place = [f"--ray_address={two_nodes}", f"--data_dir={tmp_path / 'corpus'}"]
    result = yuzogpt(*FLAGS, f"--source={source}", *place, RAY_AUTH_MODE="disabled")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "corpus" / MANIFEST).read_bytes() == reference
    nodes = [line.split() for line in result.stdout.splitlines() if line.startswith("node ")]
    documents = [int(words[2].replace(",", "")) for words in nodes]
    assert len(documents) == 2
    assert sum(documents) == 8_000
    assert min(documents) > 1_000

    # A file that turns out to be damaged is one line, here too.
    path = write_jsonl(tmp_path / "web" / "b.jsonl.gz", ["text"] * 10_000)
    write_jsonl(tmp_path / "web" / "a.jsonl.gz", make_documents(4_000))  # more than is peeked into
    path.write_bytes(path.read_bytes()[:-20])
    place = [f"--ray_address={two_nodes}", f"--data_dir={tmp_path / 'other'}"]
    result = yuzogpt(*FLAGS[:3], f"--source={path.parent}", *place, RAY_AUTH_MODE="disabled")
    assert result.returncode == 2
    assert f"{path}: damaged or not readable" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# A command that cannot write a unit's block: something else has its name.
IN_THE_WAY = """
import sys
from pathlib import Path
from yuzogpt import cli
from yuzogpt.orchestration.data import prepare

run = prepare.run_units

def with_a_folder(plan, undone, most):
    (Path(plan.shard_config.staging) / "unit-000000-train-000.arrow" / "folder").mkdir(parents=True)
    run(plan, undone, most)

prepare.run_units = with_a_folder
cli.run(sys.argv[1:])
"""


def test_what_a_task_fails_of_is_told_in_a_line(tmp_path):
    write_jsonl(tmp_path / "web" / "a.jsonl", make_documents(100))
    place = [f"--source={tmp_path / 'web'}", f"--data_dir={tmp_path / 'corpus'}"]
    ended = subprocess.run(
        [sys.executable, "-c", IN_THE_WAY, *FLAGS, *place, "--num_workers=1"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (line,) = ended.stderr.splitlines()
    assert line.startswith("yuzogpt: the preparation failed: IsADirectoryError: ")
    assert "unit-000000-train-000.arrow" in line
    assert line.endswith(": Is a directory; fix that, and the same command resumes it")
    assert ended.returncode == 1
