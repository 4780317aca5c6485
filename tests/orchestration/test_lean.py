"""What an embedded Ray leaves out depends on no name of Ray's own."""

import os
import subprocess
import sys

import pytest
from ray.train.torch import TorchTrainer

from tests.conftest import REPOSITORY
from yuzogpt.orchestration.cluster import environment, importable_checkout
from yuzogpt.orchestration.lean import few_processes, lean_trainer

PRIVATE = (
    "ray._private.node",
    "ray.train.v2._internal.execution.controller",
    "ray.train.v2._internal.execution.scaling_policy",
)


def test_where_rays_names_are_others_it_starts_as_ever(monkeypatch):
    for name in PRIVATE:
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    with few_processes():
        pass
    assert lean_trainer() is TorchTrainer


@pytest.mark.parametrize("name", PRIVATE)
def test_these_are_its_names_now(name):
    """Else Ray starts more slowly, and nothing else tells."""
    __import__(name)
    assert lean_trainer() is not TorchTrainer


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
