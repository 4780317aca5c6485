"""The core imports, trains and samples where ray cannot be imported; only one folder imports it."""

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TINY
from tests.house.shape import Package, room_of

BLOCKED = """
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ImportError("ray is blocked")

sys.meta_path.insert(0, NoRay())
from yuzogpt.cli import main
main(sys.argv[1:])
"""


def imported(path):
    """Yield the name of every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_only_orchestration_imports_ray():
    guilty = [
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "yuzogpt").rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imported(path))
    ]
    assert guilty
    assert all(name.startswith("yuzogpt/orchestration/") for name in guilty)


# A room imports only what stands before it on this line, and not its neighbours.
LAYERS = """
    errors
    rng console
    config storage
    runtime tokenization
    data model doctor
    checkpoints
    runs inference
    evaluation report tuning
    training serving
    bench orchestration
    api
    cli
    __main__
"""
# What torchrun starts is the command line, but for the launcher.
EXCEPTIONS = {("training.__main__", "cli.__init__")}


@pytest.mark.slow
def test_imports_go_one_way():
    package = Package()
    layers = [line.split() for line in LAYERS.strip().splitlines()]
    place = {room: number for number, rooms in enumerate(layers) for room in rooms}
    place["__init__"] = -1
    wrong = [
        f"{name} imports {other}"
        for name, others in package.imports.items()
        for other in others
        if room_of(name) != room_of(other)
        and place[room_of(other)] >= place[room_of(name)]
        and (name, other) not in EXCEPTIONS
    ]
    assert wrong == []


@pytest.mark.slow
def test_no_files_import_each_other():
    assert Package().circles() == []


@pytest.mark.slow
def test_few_files_stand_loose():
    loose = {name for name in Package().trees if "." not in name}
    assert loose == {"__init__", "__main__", "errors", "rng"}


@pytest.mark.slow
def test_it_trains_where_ray_is_blocked(corpus_dir, tmp_path):
    places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", BLOCKED, "train", *TINY, *places]
    result = subprocess.run(
        [*command, "--num_workers=0", "--max_iters=3"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "step 3: val loss" in result.stdout


DOTTED = re.compile(r"yuzogpt(?:\.\w+)+(?::\w+)?")


def named_in_strings():
    """Yield the dotted names in strings of the package, and in what Serve is configured by."""
    for path in (REPOSITORY / "yuzogpt").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        texts = (node.value for node in nodes if isinstance(node, ast.Constant))
        yield from (text for text in texts if isinstance(text, str) and DOTTED.fullmatch(text))
    for path in (REPOSITORY / "cluster").rglob("*.yaml"):
        yield from (name for name in DOTTED.findall(path.read_text()) if ":" in name)


def test_what_strings_name_is_there():
    """A process that starts by such a name would fail far away from here."""
    names = set(named_in_strings()) - {"yuzogpt.outcome"}  # a key of a request's scope
    assert names
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, attribute = module.rpartition(".")
        assert not attribute or hasattr(importlib.import_module(module), attribute), name
