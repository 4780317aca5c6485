"""Workers that come and go, and nodes that are lost: the order of data stays, nothing is lost."""

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY, TINY, tiny_settings
from tests.orchestration.clusters import started
from tests.training.worlds import losses, records, run_world, wait_for_start
from tests.waiting import wait_until
from yuzogpt import runs
from yuzogpt.runs.event_log import read_records

pytestmark = pytest.mark.slow

FLAGS = ("--dropout=0.1", "--eval_interval=1000", "--checkpoint_interval=3")


@pytest.fixture
def cluster():
    """A head without CPUs, and two nodes of one each."""
    with started(head_cpus=0, nodes=2) as cluster:
        yield cluster


def start(cluster, corpus_dir, out_dir, *flags):
    """Start a run on a cluster."""
    places = [f"--data_dir={corpus_dir}", f"--out_dir={out_dir}"]
    places += [f"--ray_address={cluster.address}", "--max_iters=100000"]
    return subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", "train", *TINY, *FLAGS, *places, *flags],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def trains_with(out_dir, workers, steps):
    """Return whether the last start has so many workers, and made `steps`."""
    found = read_records(out_dir / runs.METRICS)
    starts = [index for index, record in enumerate(found) if record["kind"] == "start"]
    if not starts or found[starts[-1]]["workers"] != workers:
        return False
    return sum(record["kind"] == "train" for record in found[starts[-1] :]) >= steps


def was_left_for(out_dir, reason):
    """Return whether workers have stopped for a reason."""
    return any(record["reason"] == reason for record in records(out_dir, "stop"))


def test_workers_come_and_go_and_a_node_that_will_go_is_left_with_a_checkpoint(
    cluster, corpus_dir, tmp_path
):
    out_dir = tmp_path / "run"
    # One failure is survived: that a node will go is none.
    process = start(cluster, corpus_dir, out_dir, "--num_workers=1..2", "--max_failures=1")
    wait_until(lambda: trains_with(out_dir, 2, 20), process)
    cluster.do("lose")  # without a word, as in a power cut
    wait_until(lambda: trains_with(out_dir, 1, 20), process)
    cluster.do("add")
    wait_until(lambda: trains_with(out_dir, 2, 20), process)
    cluster.do("add")
    asked = time.time()
    assert cluster.do("drain 0 60") == "True"
    wait_until(lambda: was_left_for(out_dir, "preemption of a node"), process)
    wait_for_start(out_dir, 4, 20)
    (out_dir / runs.STOP).touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output

    starts = records(out_dir, "start")
    assert [start["workers"] for start in starts] == [2, 1, 2, 2]
    assert starts[1]["redone_steps"] < starts[1]["step"]  # back to the newest checkpoint
    assert [start["redone_steps"] for start in starts[2:]] == [0, 0]  # these were announced
    assert output.count("!!! worker") == 1
    _, drained, _ = records(out_dir, "stop")  # after the pause for other workers
    assert drained["time"] - asked < 30
    by_step = losses(out_dir)
    assert sorted(by_step) == list(range(1, len(by_step) + 1))
    rows = [record["rows_seen"] for record in records(out_dir, "train")]
    assert rows == [12 * step for step in by_step]  # the order of data is the undisturbed run's

    steps = f"--max_iters={len(by_step)}"
    run_world(2, tiny_settings(corpus_dir, tmp_path / "whole", *FLAGS, steps))
    for step, loss in losses(tmp_path / "whole").items():
        assert by_step[step] == pytest.approx(loss, abs=1e-4), step

    # Where no worker trains, nobody would look for a request to stop.
    process = start(cluster, corpus_dir, tmp_path / "waiting", "--num_workers=9")
    assert process.stdout
    while "9 workers want a CPU each" not in process.stdout.readline():
        assert process.poll() is None
    while int(cluster.do("groups")) == 0:  # what they wait for
        assert process.poll() is None
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert output.strip().endswith("yuzogpt: stopped (SIGTERM); the same command resumes it")
