"""The on-premises cluster, from `ray up` to `ray down`, on hosts that lose their power.

Each of the four hosts is a machine to Ray: see machines.py. What happens when is printed (-s).
"""

import json
import random
import subprocess
import sys
import sysconfig
import threading
import time

import pytest

from tests.hosts import machines
from tests.hosts.clusters import PRESET, SMALL, TRAINING, Cluster, mode
from tests.training.worlds import (
    losses,
    records,
    run_world,
    wait_for_start,
    wait_for_step,
    weights,
)
from tests.waiting import wait_until
from yuzogpt import runs
from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import resolve

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
FLAGS = ("--eval_interval=50",)
STEPS = 600
CANARY = "c0ffee" * 6 + "beef"  # as long as a key of W&B's
OTHER_NUMPY = "2.3.5"


@pytest.fixture(scope="module")
def cluster():
    """A head without training work, and three workers."""
    if missing := machines.missing():
        pytest.skip(f"NO HOSTS WITHOUT {missing.upper()}: `ray up` IS NOT TESTED HERE")
    with machines.started(4) as hosts:
        cluster = Cluster(hosts)
        cluster.up()
        yield cluster


def host_that_trains(cluster, other_than=()):
    """Return a host that has one of the run's workers."""
    found = [host for host in cluster.workers if host.has("RayTrainWorker")]
    return random.choice([host for host in found if host not in other_than])


def undisturbed(corpus_dir, out_dir, steps):
    """Train as many steps with two ranks to which nothing happens."""
    places = (f"--data_dir={corpus_dir}", f"--out_dir={out_dir}", f"--max_iters={steps}")
    run_world(2, resolve(TrainSettings, [PRESET], [*TRAINING, *FLAGS, *places]))


def wait_for_workers(run, number, workers, steps):
    """Wait until the run was started so often, with so many workers, and made some steps."""
    wait_for_start(run, number, steps)
    start = records(run, "start")[number - 1]
    assert start["workers"] == workers
    return start


def test_nobody_comes_in_without_the_token(cluster):
    assert cluster.status("/api/jobs/") == 401
    assert cluster.status("/api/jobs/", token="0" * 64) == 403
    assert cluster.status("/api/jobs/", token=cluster.token.read_text()) == 200
    for host in cluster.hosts.all:
        assert mode(host.home / ".ray" / "auth_token") == 0o600
        sockets = host.run("ss -Hltn 'sport = :8265'").splitlines()
        listening = [line.split()[3] for line in sockets]
        assert listening == (["127.0.0.1:8265"] if host is cluster.head else [])


def test_the_doctor_passes_a_sound_cluster(cluster):
    began = time.monotonic()
    printed = cluster.submit(
        "jobs/doctor.py", f"--storage={cluster.hosts.shared}", "--num_nodes=4", "--json"
    )
    seconds = time.monotonic() - began
    cluster.say(f"doctor: {seconds:.1f} s")
    found, _ = json.JSONDecoder().raw_decode(printed[printed.index("{\n") :])
    assert [finding for finding in found["findings"] if finding["level"] == "fault"] == []
    assert found["verdict"] == "sound"
    assert len(found["links"]) == 12
    assert found["network"]["bandwidth"] > 0
    assert {node["interface"] for node in found["nodes"].values()} == {"eth0"}


def test_a_host_loses_power_and_the_spare_takes_over(cluster, corpus_dir, tmp_path):
    run = cluster.hosts.shared / "spare"
    key_file = cluster.hosts.state / "wandb-key"
    key_file.touch(mode=0o600)
    key_file.write_text(CANARY)
    wandb = ("--wandb_log=True", f"--wandb_key_file={key_file}")
    flags = (*FLAGS, *wandb, f"--max_iters={STEPS}", "--num_workers=2")
    cluster.train(corpus_dir, "spare", *flags)
    made = wait_for_start(run, 1, random.randrange(60, 120))
    cluster.say(f"submitted, trains: step {made}")
    victim = host_that_trains(cluster)
    victim.power_off()
    cluster.say(f"{victim.name} loses power")
    began = time.monotonic()
    start = wait_for_workers(run, 2, 2, 1)
    cluster.say(f"recovered at step {start['step']}, {time.monotonic() - began:.1f} s later")
    wait_for_step(run, STEPS)
    wait_until(lambda: bool(records(run, "final")), seconds=60)
    cluster.say(f"finished: step {STEPS}")
    victim.boot()
    cluster.say(f"{victim.name} has power again")

    undisturbed(corpus_dir, tmp_path / "plain", STEPS)
    assert losses(run) == losses(tmp_path / "plain")
    assert weights(run, STEPS) == weights(tmp_path / "plain", STEPS)
    cluster.wait_for_nodes(4)
    cluster.say("and is back in the cluster")

    assert CANARY not in cluster.ray("job", "list", f"--address={cluster.address}")
    places = [run, *(host.directory / "tmp-ray" for host in cluster.hosts.all)]
    assert list((cluster.head.directory / "tmp-ray").glob("session_2*/logs/job-driver-*"))
    found = subprocess.run(["grep", "-rlF", CANARY, *places], capture_output=True, check=False)
    assert found.stdout == b""


def other_environment(directory):
    """Make an environment like this one, but for another version of numpy."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "all.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = directory / "bin" / "python"
    install = "-m pip install --quiet --disable-pip-version-check --no-deps --ignore-installed"
    subprocess.run([python, *install.split(), f"numpy=={OTHER_NUMPY}"], check=True)
    return python


def test_the_doctor_finds_what_is_wrong(cluster, tmp_path):
    first, second, third = cluster.workers
    python = other_environment(tmp_path / "other")
    third.run(f"HOME={third.home} bash -l -c 'source ~/.bashrc; ray stop --force'")
    third.run(
        f"HOME={third.home} RAY_AUTH_MODE=token faketime -f +90s "
        f"{python} -c 'from ray.scripts.scripts import main; main()' start "
        f"--address={cluster.head.address}:6379 --num-cpus=1 {SMALL}"
    )
    cluster.wait_for_nodes(4)
    shared = cluster.hosts.shared
    with first.read_only(shared), second.slow("10mbit"), second.closed_to(first):
        # Four hosts share two cores with all else that runs: a link of theirs may seem slow.
        flags = (f"--storage={shared}", "--num_nodes=5", "--min_bandwidth_mbit=50", "--json")
        printed = cluster.submit("jobs/doctor.py", *flags, fails=True)
    found, _ = json.JSONDecoder().raw_decode(printed[printed.index("{\n") :])
    faults = {(one["where"], one["what"]) for one in found["findings"] if one["level"] == "fault"}
    expected = (
        ("cluster", "4 of 5 nodes have joined"),
        (first.name, "cannot be written (Read-only file system)"),
        (second.name, "slow link: "),
        (second.name, f"cannot be reached from {first.name}"),
        (third.name, f"numpy {OTHER_NUMPY}, where others have"),
        (third.name, "s ahead of the others"),
    )
    for where, what in expected:
        assert any(host == where and what in text for host, text in faults), (where, what, faults)
    assert len(faults) == len(expected), sorted(faults)
    cluster.say("doctor: 6 faults of 6 found")


def test_without_a_spare_one_worker_goes_on(cluster, corpus_dir, tmp_path):
    run = cluster.hosts.shared / "elastic"
    *others, spare = cluster.workers
    spare.power_off()
    flags = (*FLAGS, "--max_iters=1000000", "--num_workers=1..2")
    cluster.train(corpus_dir, "elastic", *flags)
    wait_for_workers(run, 1, 2, 100)
    cluster.say("submitted: 2 workers, no spare")
    victim = random.choice(others)
    victim.partition()
    cluster.say(f"{victim.name} is cut off")
    start = wait_for_workers(run, 2, 1, 50)
    cluster.say(f"continues with 1 worker at step {start['step']}")
    (run / runs.STOP).touch()
    wait_until(lambda: bool(records(run, "stop")), seconds=60)
    cluster.say("stopped")

    by_step = losses(run)
    rows = [record["rows_seen"] for record in records(run, "train")]
    assert rows == [12 * step for step in range(1, len(by_step) + 1)]
    undisturbed(corpus_dir, tmp_path / "plain", len(by_step))
    for step, loss in losses(tmp_path / "plain").items():
        assert by_step[step] == pytest.approx(loss, abs=1e-4), step


def test_down_leaves_nothing(cluster):
    cluster.down()
    for host in cluster.workers:
        if host.processes():
            host.run(f"HOME={host.home} bash -l -c 'source ~/.bashrc; ray stop --force'")
    cluster.say("down")
    wait = threading.Event()
    for _ in range(100):
        if not any(host.has("raylet") or host.has("gcs_server") for host in cluster.hosts.all):
            return
        wait.wait(0.1)
    raise AssertionError("Ray still runs")
