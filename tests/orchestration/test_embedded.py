"""An embedded Ray where Ray by itself would hang or complain: uv, spaces, containers."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.orchestration.test_interrupted import rays_of
from yuzogpt.orchestration import embedded
from yuzogpt.orchestration.embedded import importable_checkout
from yuzogpt.orchestration.environment import environment

# What Ray would make of a worker's environment, where an embedded one is about to start.
LOOK = """
from yuzogpt.orchestration import cluster, embedded

def look(**_):
    from ray._private.worker import _maybe_modify_runtime_env
    print(_maybe_modify_runtime_env({}, False))

embedded.connect = look
with embedded.embedded(1):
    pass
"""


def test_started_by_uv_workers_run_in_the_same_environment(tmp_path):
    """Ray looks for `uv run` among its ancestors: here it is a shell of that name."""
    (tmp_path / "run").write_text('"$@"\nexit $?\n')
    ended = subprocess.run(
        ["uv", "run", sys.executable, "-c", LOOK],
        executable=shutil.which("bash"),
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "RAY_RUNTIME_ENV_HOOK": "not.to.be.called",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "{}\n", ended.stderr


def test_the_object_store_is_put_where_it_fits(monkeypatch, tmp_path):
    assert embedded.plasma_directory(tmp_path) is None
    for place in ("/proc", str(tmp_path / "missing")):  # the first has no room for anything
        monkeypatch.setattr(embedded, "SHARED_MEMORY", place)
        assert embedded.plasma_directory(tmp_path) == str(tmp_path)


# A task with an environment of its own, as a training worker's, where /dev/shm is as Docker's.
TASK = """
import sys
from yuzogpt.orchestration import cluster, embedded

connect = embedded.connect

def connect_with_little_memory(**options):
    import ray._private.utils
    ray._private.utils.get_shared_memory_bytes = lambda: 2**26
    connect(**options)

embedded.connect = connect_with_little_memory
embedded.SHARED_MEMORY = "/proc"
with cluster.connected("", 1):
    import ray

    @ray.remote(runtime_env={"env_vars": {"SOME": "variable"}})
    def which():
        return sys.executable

    print(ray.get(which.remote()))
"""


@pytest.mark.slow
def test_a_python_in_a_path_with_spaces_in_a_container(tmp_path):
    """HOME cannot be written, /dev/shm is small; Ray puts the path into a shell's line."""
    place = tmp_path / "my  envs" / "one"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (found,) = place.glob("lib/python*/site-packages")
    (found / "here.pth").write_text(sysconfig.get_path("purelib"))
    python = Path(place, "bin", "python")
    ended = subprocess.run(
        [python, "-c", TASK],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": "/proc/none"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.stdout == f"{python}\n", ended.stderr
    assert ended.stderr == ""


# Ray's start as it is where it never ends.
HANGS = """
import threading
from yuzogpt.orchestration import cluster, embedded, stuck

def hang(**_):
    print("starting", flush=True)
    threading.Event().wait()

embedded.connect = hang
stuck.SIGNAL_TIMEOUT_S = 0.1
with cluster.connected("", 1):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "says"),
    [(signal.SIGTERM, "stopped (SIGTERM)"), (signal.SIGINT, "interrupted")],
)
def test_a_start_that_never_ends_is_ended_by_a_signal(sign, says):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "starting\n"
    (directory,) = rays_of(process)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    assert errors == f"yuzogpt: {says}; Ray had not started\n"
    assert process.returncode == 128 + sign
    assert not directory.exists()


# A Ray whose workers are to run a Python that is not there.
NO_PYTHON = """
from yuzogpt.errors import RunFailed
from yuzogpt.orchestration import cluster, embedded, stuck

embedded.runtime_environment = lambda: {"py_executable": "/no/such/python"}
stuck.WORKER_START_TIMEOUT_S = 1
try:
    with cluster.connected("", 1):
        import ray
        ray.get(ray.remote(lambda: 0).remote())
except RunFailed as error:
    print(error)
"""


@pytest.mark.slow
def test_workers_that_can_never_start_are_not_waited_for():
    ended = subprocess.run(
        [sys.executable, "-c", NO_PYTHON],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout.startswith("Ray cannot start its workers here: "), ended.stderr
    assert "/no/such/python: No such file or directory" in ended.stdout
    assert len(ended.stdout.splitlines()) == 1


def test_variables_are_as_before_when_an_embedded_ray_has_ended(monkeypatch):
    monkeypatch.setenv("OF_THE_USER", "kept")
    monkeypatch.delenv("OF_RAY", raising=False)
    with environment({"OF_THE_USER": "changed", "OF_RAY": "set"}):
        assert (os.environ["OF_THE_USER"], os.environ["OF_RAY"]) == ("changed", "set")
    assert os.environ["OF_THE_USER"] == "kept"
    assert "OF_RAY" not in os.environ


def test_a_clone_that_is_not_installed_is_found_from_anywhere(tmp_path):
    """Without site-packages, in another directory."""
    found = subprocess.run(
        [sys.executable, "-S", "-c", "import yuzogpt.errors as e; print(e.__file__)"],
        env={**os.environ, **importable_checkout()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(REPOSITORY / "yuzogpt" / "errors.py")
