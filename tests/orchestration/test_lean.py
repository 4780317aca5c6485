"""What an embedded Ray leaves out depends on no name of Ray's own."""

import sys

import pytest
from ray.train.torch import TorchTrainer

from yuzogpt.orchestration.lean import few_processes, lean_trainer

PRIVATE = ("ray._private.node", "ray.train.v2._internal.execution.scaling_policy")


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
