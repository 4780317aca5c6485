"""What sets nodes and accounts up: install.sh runs here; the rest as far as the first cloud."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster.rules import CLUSTER
from tests.conftest import REPOSITORY

SCRIPTS = sorted(CLUSTER.glob("*.sh"))


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node as file_mounts leaves it: the project, and the token in Ray's mode."""
    project = tmp_path / "yuzogpt"
    (project / "cluster").mkdir(parents=True)
    shutil.copy(CLUSTER / "install.sh", project / "cluster")
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(REPOSITORY / name, project)
    shutil.copytree(REPOSITORY / "requirements", project / "requirements")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("token")
    (tmp_path / ".ray/auth_token").chmod(0o644)
    return tmp_path


def install(node: Path, *extra: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run install.sh as a node does: from another directory."""
    return subprocess.run(
        ["sh", str(node / "yuzogpt/cluster/install.sh"), *extra],
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": str(node), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def stamp(node: Path, extra: str = "") -> None:
    """Leave the mark of a finished installation, named as the Makefile names it."""
    makefile = (REPOSITORY / "Makefile").read_text()
    (command,) = re.findall(r"\.ready-\$\(shell (.*)\)\n", makefile)
    key = subprocess.check_output(["sh", "-c", command], cwd=node / "yuzogpt", text=True).strip()
    (node / "yuzogpt-venv").mkdir(exist_ok=True)
    (node / f"yuzogpt-venv/.ready-{key}{extra}").touch()


def test_a_node_that_is_ready_is_left_alone(node):
    stamp(node)
    for _ in range(2):
        done = install(node, PYTHON="false")  # no Python is asked
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"{node}/yuzogpt-venv: ready\n"
    assert len(list((node / "yuzogpt-venv").iterdir())) == 1  # the stamp


def test_commands_of_ray_and_of_jobs_find_the_environment(node):
    stamp(node)
    install(node)
    install(node)
    assert (node / ".bashrc").read_text().count("\n") == 1
    shell = f'. {node}/.bashrc; printf \'%s %s\' "$RAY_AUTH_MODE" "$PATH"'
    output = subprocess.check_output(["bash", "-c", shell], env={"PATH": "/bin"}, text=True)
    assert output == f"token {node}/yuzogpt-venv/bin:/bin"


def test_the_token_is_for_its_owner_alone(node):
    stamp(node)
    install(node)
    assert (node / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("case", ["changed", "other extra", "never installed"])
def test_a_node_that_is_not_ready_is_set_up(node, case):
    if case != "never installed":
        stamp(node)
    if case == "changed":
        with (node / "yuzogpt/requirements/core.txt").open("a") as pins:
            pins.write("six==1.17.0\n")
    extra = ["aws"] if case == "other extra" else []
    done = install(node, *extra, PYTHON="false")
    assert done.returncode == 1  # it got to where it needs Python
    assert done.stderr.startswith("install.sh: ")
    assert done.stderr.count("\n") == 1


def test_an_extra_has_a_mark_of_its_own(node):
    stamp(node, "-aws")
    assert install(node, "aws", PYTHON="false").returncode == 0
    assert install(node, "gcp", PYTHON="false").returncode == 1


def test_what_nodes_install_is_pinned():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = project["optional-dependencies"]
    assert {"cluster", "aws", "gcp", "azure"} <= set(extras)
    for text in [*project["dependencies"], *(text for extra in extras.values() for text in extra)]:
        wanted = Requirement(text)
        if wanted.name != "yuzogpt":
            assert pins[canonicalize_name(wanted.name)] in wanted.specifier, text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_read_by_a_plain_shell(path):
    subprocess.run(["sh", "-n", str(path)], check=True)
    text = path.read_text()
    assert text.startswith("#!/bin/sh\n")
    assert "\nset -eu\n" in text


@pytest.mark.parametrize("name", ["gcp-access.sh", "azure-access.sh"])
@pytest.mark.parametrize(
    "cidr", ["0.0.0.0/0", "0.0.0.0/1", "10.0.0.0/4", "198.51.100.7", "*", "any"]
)
def test_ssh_for_everyone_is_refused(name, cidr, tmp_path):
    for cloud in ("gcloud", "az"):  # would be called next
        (tmp_path / cloud).write_text("#!/bin/sh\necho asked the cloud\n")
        (tmp_path / cloud).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(ssh_from: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(CLUSTER / name), "project", "name", ssh_from]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    refused = run(cidr)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert cidr in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert run("198.51.100.7/32").stdout.startswith("asked the cloud")


def test_what_the_image_copies_is_there():
    text = (CLUSTER / "Containerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (REPOSITORY / source).exists(), source
    # What the build needs, pyproject.toml names: readme, license, packages.
    assert {"README.md", "LICENSE", "yuzogpt"} <= set(text.split())


def test_the_image_is_pinned_and_not_root():
    lines = (CLUSTER / "Containerfile").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[:2] == ["ARG BASE", "FROM ${BASE}"]  # no default: a build without one ends there
    users = [line for line in code if line.startswith("USER")]
    assert users == ["USER 1000:1000"]
    assert not any(line.startswith(("RUN", "COPY", "ADD")) for line in code[code.index(users[0]) :])


@pytest.mark.parametrize(
    ("base", "status"), [("python:3.12-slim", 1), ("python:3.12-slim@sha256:" + "0" * 64, 0)]
)
def test_a_base_without_digest_is_refused(base, status):
    text = (CLUSTER / "Containerfile").read_text().replace("\\\n", "")
    (check,) = re.findall(r"^RUN (case .*)$", text, re.MULTILINE)
    run = subprocess.run(["sh", "-c", check], env={"BASE": base}, capture_output=True, check=False)
    assert run.returncode == status
