"""Takes Ray's private names away, each in a process of its own, and uses what needs it.

    python -m tests.orchestration.without_names NAME...

Prints a line of JSON for each name: the features that did without it, or the exception.
"""

import importlib
import json
import os
import pkgutil
import sys
import traceback
from types import SimpleNamespace

from ray._private import worker as ray_worker
from ray._private.node import Node
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager

from yuzogpt import orchestration
from yuzogpt.orchestration import optional_names, ray_internals

# Imported before: what no name is taken from, and what takes long.
BEFORE = ("ray.data", "ray.serve", "ray.tune", "yuzogpt.serving.launch", "yuzogpt.training.launch")


def take(name):
    """Remove a module, or what is in it; a parameter is only counted as missing."""
    module, _, attributes = name.partition(":")
    if not attributes:
        sys.modules[module] = None  # an import fails
        return
    owner = importlib.import_module(module)
    *owners, attribute = attributes.split(".")
    for part in owners:
        owner = getattr(owner, part)
    fields = getattr(owner, "__dataclass_fields__", {})
    if attribute in fields:
        del fields[attribute]
    elif isinstance(owner, type):
        for base in owner.__mro__:
            if attribute in vars(base):
                delattr(base, attribute)
    elif hasattr(owner, attribute):
        delattr(owner, attribute)
    else:
        os.environ[optional_names.WITHOUT] = name


class Group:
    """A group of one worker, as Ray Train has it."""

    def get_workers(self):
        """Return its worker."""
        return [SimpleNamespace(actor="actor", metadata=SimpleNamespace(node_id="node"))]

    def get_worker_group_state(self):
        """Return its placement group."""
        group = SimpleNamespace(id=SimpleNamespace(hex=lambda: "ff"))
        return SimpleNamespace(placement_group_handle=SimpleNamespace(placement_group=group))


def features_without():
    """Use all features; return those that did without Ray's private names."""
    from yuzogpt.orchestration.train import single_node
    from yuzogpt.orchestration.train.warm_workers import setup_hook

    if hasattr(ray_worker, "_global_node"):
        ray_worker._global_node = SimpleNamespace(get_temp_dir_path=lambda: "Ray's files")
    with ray_internals.minimal_node_services():
        names = (name.rpartition(".")[2] for name in ray_internals.NODE_SERVICES)
        starts = [getattr(Node, name, None) is not ray_internals.do_nothing for name in names]
    kill = getattr(Node, "kill_all_processes", None)
    with ray_internals.kill_node_immediately():
        waits = getattr(Node, "kill_all_processes", None) is kill
    ray_internals.disable_checkpoint_state()
    write = getattr(CheckpointManager, "_write_state_to_storage", None)
    register = getattr(TorchTrainer, "_register_sigint_handler", None)
    with ray_internals.ray_train_ignores_interrupts():
        registers = getattr(TorchTrainer, "_register_sigint_handler", None) is register
    group, lost = Group(), WorkerHealthCheckFailedError("gone", RuntimeError())
    bases = [
        ray_internals.callback_base(f"{owner}Callback") for owner in ("Controller", "WorkerGroup")
    ]
    config = single_node.torch_config(5)
    assert config.timeout_s == 5
    without = {
        "node_services": any(starts),
        "node_kill": waits,
        "init_options": len(ray_internals.init_options(_memory=1, _plasma_directory=1, _temp_dir=1))
        < 3,
        "doctor": ray_internals.node_temp_dir() != "Ray's files",
        "train_callbacks": any(base.__module__ == ray_internals.__name__ for base in bases),
        "single_node": single_node.single_node_trainer() is TorchTrainer,
        "interrupts": registers,
        "torch_backend": type(config) is TorchConfig,
        "workers": not (ray_internals.worker_actors(group) and ray_internals.worker_nodes(group)),
        "checkpoint_state": write is not ray_internals.do_nothing,
        "train_files": not ray_internals.train_files(),
        "warm_workers": not setup_hook(),
        "placement_group": ray_internals.placement_group_id(group) is None,
        "dead_worker": not ray_internals.is_lost_worker(lost),
    }
    for name, use, answer in (  # with their private names, these need a Ray that runs
        ("preemption", ray_internals.is_node_preempted, False),
        ("authentication", ray_internals.read_authentication_again, None),
        ("coordinator", lambda: ray_internals.refresh_node_count("run"), None),
        ("serve_address", ray_internals.serve_address, None),
        ("proxy_callback", lambda: None, None),
        ("doctor", ray_internals.dashboard_address, ""),
    ):
        without[name] = not ray_internals.has(name)
        assert not without[name] or use() == answer, name
    assert without.keys() == ray_internals.FEATURES.keys()
    return sorted(name for name, is_without in without.items() if is_without)


def main():
    """Print what each name costs."""
    for name in BEFORE:
        importlib.import_module(name)
    for name in sys.argv[1:]:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            take(name)
            for module in pkgutil.walk_packages(
                orchestration.__path__, f"{orchestration.__name__}."
            ):
                importlib.import_module(module.name)
            outcome = features_without()
        except BaseException:
            outcome = traceback.format_exc()
        print(json.dumps([name, outcome]), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
