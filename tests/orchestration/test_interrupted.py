"""A command on an embedded Ray, ended: what it says, and that nothing is lost or stays behind."""

import contextlib
import ipaddress
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, TINY, tiny_settings
from tests.training.worlds import losses, records, run_world, wait_for_start, weights
from tests.waiting import wait_until
from yuzogpt import checkpoints, runs
from yuzogpt.orchestration import leftovers
from yuzogpt.storage.run_storage import LocalStorage

pytestmark = pytest.mark.slow


STEPS = 250
FLAGS = (
    "--dropout=0.1",
    "--eval_interval=25",
    f"--max_iters={STEPS}",
    "--warm_spare_workers=False",
)


def start(corpus_dir: Path, out_dir: Path, *more: str) -> "subprocess.Popen[str]":
    """Start the run, or go on with it."""
    flags = ["train", *TINY, *FLAGS, f"--data_dir={corpus_dir}", f"--out_dir={out_dir}", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", *flags, "--num_workers=2"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def rays_of(process: "subprocess.Popen[str]") -> list[Path]:
    """Return the directories of the embedded Rays of a command."""
    owners = Path("/tmp").glob(f"{leftovers.PREFIX}*/{leftovers.OWNER}")
    return [
        path.parent for path in owners if json.loads(path.read_text())["process"] == process.pid
    ]


def kept(out_dir: Path) -> str:
    """Return what the last line of a run that was asked to stop says of its newest step."""
    stop = records(out_dir, "stop")[-1]
    assert stop["kept"] == stop["step"] == max(losses(out_dir))
    return f"at step {stop['step']}: kept in {out_dir}; the same command resumes it"


def ended_leaving_nothing(process: "subprocess.Popen[str]", directory: Path) -> str:
    """Wait for the end of a command and of its embedded Ray; return its last line."""
    _, errors = process.communicate(timeout=60)
    assert not directory.exists()
    assert leftovers.processes_of(directory) == []
    (line,) = errors.splitlines()
    return line


def test_a_command_may_be_ended_in_every_way_and_loses_nothing(corpus_dir, tmp_path):
    out_dir = tmp_path / "run"
    process = start(corpus_dir, out_dir, "--warm_spare_workers=True")
    wait_for_start(out_dir, 1, 20)
    (directory,) = rays_of(process)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    no_process_is_idle(everyone)
    for one in everyone:  # as Slurm does, and systemd
        one.terminate()
    line = ended_leaving_nothing(process, directory)
    assert line == f"yuzogpt: stopped (SIGTERM) {kept(out_dir)}"
    assert process.returncode == 143

    process = start(corpus_dir, out_dir)
    wait_for_start(out_dir, 2, 20)
    (directory,) = rays_of(process)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C: a terminal signals all processes
    line = ended_leaving_nothing(process, directory)
    assert line == f"yuzogpt: interrupted {kept(out_dir)}"
    assert process.returncode == 130

    process = start(corpus_dir, out_dir)
    wait_for_start(out_dir, 3, random.randrange(20, 50))
    (directory,) = rays_of(process)
    for one in psutil.Process(process.pid).children(recursive=True):
        if "RayTrainWorker" in " ".join(one.cmdline()):
            one.suspend()  # so nobody answers the first request
    kept_step = checkpoints.newest(LocalStorage(out_dir), pytest.fail).state.step
    os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: (out_dir / runs.STOP).exists())
    threading.Event().wait(0.3)  # so that the next one is another request
    os.killpg(process.pid, signal.SIGINT)
    line = ended_leaving_nothing(process, directory)
    lost = f"all steps after {kept_step} are lost"
    assert line == (
        f"yuzogpt: ended at once: {lost}; the same command resumes from step {kept_step}"
    )
    assert process.returncode == 130

    process = start(corpus_dir, out_dir)
    wait_for_start(out_dir, 4, random.randrange(20, 50))
    (directory,) = rays_of(process)
    process.kill()
    process.communicate(timeout=60)
    assert leftovers.processes_of(directory)  # Ray's agents outlive a killed driver
    # What a crash may leave of Ray Train's own state hinders nothing.
    (out_dir / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')

    process = start(corpus_dir, out_dir)  # and first of all sweeps up
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert not directory.exists()
    undisturbed = runs.check(tiny_settings(corpus_dir, tmp_path / "plain", *FLAGS)).settings
    run_world(2, undisturbed)
    assert losses(out_dir) == losses(tmp_path / "plain")
    assert weights(out_dir, STEPS) == weights(tmp_path / "plain", STEPS)
    starts = records(out_dir, "start")
    assert len(starts) == 5
    assert [start["redone_steps"] for start in starts[1:3]] == [0, 0]


def test_nobody_elsewhere_reaches_an_embedded_ray_or_its_workers(corpus_dir, tmp_path):
    """The store and gloo's sockets, Ray's ports and metrics: on the loopback interface alone."""
    process = start(corpus_dir, tmp_path / "run")
    wait_for_start(tmp_path / "run", 1, 5)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    open_to = {
        (ipaddress.ip_address(found.laddr.ip), " ".join(one.cmdline())[:80])
        for one in everyone
        for found in one.net_connections("inet")
        if found.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and found.laddr
    }
    process.kill()
    process.communicate(timeout=60)
    leftovers.sweep()
    assert sum("RayTrainWorker" in title for _, title in open_to) > 1
    assert [found for found in open_to if not is_loopback(found[0])] == []


def is_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is of this machine alone."""
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def no_process_is_idle(processes: list[psutil.Process]) -> None:
    """No dashboard, no autoscaler, no controller; and Ray Train takes the workers made for it."""
    titles: list[str] = []
    working: Counter[str] = Counter()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            titles.append(" ".join(process.cmdline()))
            if "ray::" in titles[-1]:
                working[titles[-1].split("::")[1].split(".")[0].strip()] += 1
    del working["SynchronizationActor"]  # it comes some time after the first step
    assert working == {
        "DashboardAgent": 1,  # Ray's raylet does not do without it
        "RayTrainWorker": 2,  # had it started two more, these would be idle
        "RuntimeEnvAgent": 1,
    }
    assert not [t for t in titles if "monitor.py" in t or "dashboard.py" in t]


@pytest.mark.parametrize(
    ("sign", "status", "says"),
    [
        (signal.SIGINT, 130, "interrupted; the same command resumes it"),
        (signal.SIGTERM, 143, "stopped (SIGTERM); the same command resumes it"),
    ],
)
def test_a_command_is_ended_while_ray_starts(corpus_dir, tmp_path, sign, status, says):
    process = start(corpus_dir, tmp_path / "run")
    assert process.stdout
    while "starting Ray" not in process.stdout.readline():
        assert process.poll() is None
    wait = threading.Event()
    while not rays_of(process):  # its directory is the first that is made
        wait.wait(0.01)
    wait.wait(random.uniform(0, 3))  # any moment of Ray's start
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.strip().splitlines()[-1] == f"yuzogpt: {says}"
    assert rays_of(process) == []


WAITING = """
import os, signal, sys, time
from yuzogpt.errors import Stopped
from yuzogpt.orchestration.cluster import connected
from yuzogpt.runtime.signals import stopped_by_sigterm

def stop(process):
    os.kill(process, signal.SIGTERM)
    time.sleep(600)

try:
    with stopped_by_sigterm("stopped in ray.get"), connected("", 1):
        import ray
        ray.get(ray.remote(stop).remote(os.getpid()))
except Stopped as error:
    print(error)
"""


def test_sigterm_in_a_call_of_rays_stops():
    """Of most exceptions of a signal's handler such a call makes a SystemError."""
    ended = subprocess.run(
        [sys.executable, "-c", WAITING],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout == "stopped in ray.get\n", ended.stderr
