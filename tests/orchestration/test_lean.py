"""What an embedded Ray leaves out depends on no name of Ray's own."""

import os
import subprocess
import sys

import pytest
from ray.train.torch import TorchTrainer

from tests.conftest import REPOSITORY
from yuzogpt.orchestration.embedded import importable_checkout
from yuzogpt.orchestration.environment import environment
from yuzogpt.orchestration.lean import minimal_node_services, single_node_trainer

PRIVATE = (
    "ray._private.node",
    "ray.train.v2._internal.execution.controller",
    "ray.train.v2._internal.execution.scaling_policy",
)


def test_where_rays_names_are_others_it_starts_as_ever(monkeypatch):
    for name in PRIVATE:
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    with minimal_node_services():
        pass
    assert single_node_trainer() is TorchTrainer


# Names of Ray's by which something is started or ended sooner, or is noticed sooner.
NAMES = (
    "ray._private.node:",
    "ray._private.node:Node.kill_all_processes",
    "ray._private.node:Node.start_monitor",
    "ray.runtime_context:RuntimeContext.current_actor",
    "ray.train.torch:TorchConfig.backend_cls",
    "ray.train.torch.config:_TorchBackend.on_start",
    "ray.train.torch:TorchTrainer._create_default_callbacks",
    "ray.train.torch:TorchTrainer._initialize_and_run_controller",
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback",
    "ray.train.v2._internal.execution.callback:",
    "ray.train.v2._internal.execution.checkpoint.checkpoint_manager:",
    "ray.train.v2._internal.execution.context:",
    "ray.train.v2._internal.execution.controller:TrainController.get_result",
)
# Takes each away in a process of its own: all of Ray is imported once.
TAKEN = """
import importlib, os, sys, traceback, types
from pathlib import Path

import ray.train.torch

def take(wanted):
    module, _, name = wanted.partition(":")
    owner, _, attribute = name.partition(".")
    found = importlib.import_module(module)
    if not owner:
        sys.modules[module] = None  # an import fails
    elif not attribute:
        delattr(found, owner)
    else:
        for one in getattr(found, owner).__mro__:
            if attribute in vars(one):
                delattr(one, attribute)

def use(wanted):
    from yuzogpt.orchestration import elastic, failures, interfaces, placement, spares
    from yuzogpt.orchestration.train.controller import no_actor_here
    from yuzogpt.orchestration.lean import ended_at_once, few_processes, lean_trainer, torch_config

    with few_processes(), ended_at_once(), no_actor_here():
        pass
    assert torch_config(5).timeout_s == 5
    is_of_trainer = "TorchTrainer" in wanted or "TrainController" in wanted
    assert (lean_trainer() is ray.train.torch.TorchTrainer) == is_of_trainer
    of_others = types.SimpleNamespace()
    for callback in (
        failures.NoSnapshot(), failures.NothingLeft(), failures.NoPatience(),
        interfaces.ChosenInterface(), elastic.Elastic(LocalStorage(Path()), 1),
        placement.PlacementNote(Path()),
    ):
        for event in ("after_controller_start", "after_worker_group_start"):
            getattr(callback, event, lambda _: None)(of_others)
    if wanted.endswith(".context:"):
        assert elastic.preemption() is None

for wanted in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            take(wanted)
            use(wanted)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(wanted)
"""


@pytest.mark.slow
def test_no_private_name_of_rays_is_needed():
    ended = subprocess.run(
        [sys.executable, "-c", TAKEN, *NAMES],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "", ended.stderr


@pytest.mark.parametrize("name", PRIVATE)
def test_these_are_its_names_now(name):
    """Else Ray starts more slowly, and nothing else tells."""
    __import__(name)
    assert single_node_trainer() is not TorchTrainer


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
