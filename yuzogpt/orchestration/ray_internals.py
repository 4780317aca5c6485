"""Every private name of Ray's that this package uses, and what is lost where a Ray lacks it.

No command depends on one of them: each is optional, and Ray's own way is used without it.
`python -m yuzogpt.orchestration.ray_internals` prints which ones the installed Ray has.
YUZOGPT_WITHOUT_RAY_INTERNALS=all, or names with commas between them, does without them: this shows
whether one is to blame for a problem.
"""

import contextlib
import functools
import logging
import tempfile
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from yuzogpt.console.terminal import say
from yuzogpt.orchestration.optional_names import (
    MISSING,
    Feature,
    do_nothing,
    replaced,
    resolve,
)

EXECUTION = "ray.train.v2._internal.execution"
GROUP = f"{EXECUTION}.worker_group"
NODE = "ray._private.node:Node"
TRAINER = "ray.train.torch:TorchTrainer"
CONTROLLER = f"{EXECUTION}.controller:TrainController"
POLICY = f"{EXECUTION}.scaling_policy:FixedScalingPolicy"
CURRENT_ACTOR = "ray.runtime_context:RuntimeContext.current_actor"
RPC = "ray.core.generated"

logger = logging.getLogger("yuzogpt")


# Methods of Ray's node that start the autoscaler, what carries workers' output to the driver (we
# switch that off), and the server behind the dashboard and the interfaces for jobs and states.
NODE_SERVICES = (f"{NODE}.start_monitor", f"{NODE}.start_log_monitor", f"{NODE}.start_api_server")
# The first removes the placement group of a dead controller, and asks the server above: a command's
# group ends with all of Ray; for a trial's there is tune/placement.py. The second shares out
# datasets: we have none. Workers wait 3 s for the process of each.
UNUSED_CALLBACKS = (
    "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
    "ray.train.v2._internal.callbacks.datasets:DatasetsCallback",
)
FEATURES = {
    "node_services": Feature(
        "start an embedded Ray's node with its GCS, its raylet and their agents alone",
        "three more processes; each costs a second or more of a core at the start",
        NODE_SERVICES,
    ),
    "node_kill": Feature(
        "kill an embedded Ray's processes at its end",
        "SIGTERM comes first, and Ray waits for its processes",
        (f"{NODE}.kill_all_processes.allow_graceful",),
    ),
    "init_options": Feature(
        "keep an embedded Ray's files in its private directory, and set its memory",
        "Ray's files lie in its own temporary directory and stay there; it measures memory itself",
        ("ray:init._memory", "ray:init._plasma_directory", "ray:init._temp_dir"),
    ),
    "authentication": Feature(
        "give an embedded Ray a token in a program that imported ray before",
        "it does not start there, unless RAY_AUTH_MODE=token was set before",
        ("ray._raylet:Config", "ray._raylet:AuthenticationTokenLoader"),
    ),
    "doctor": Feature(
        "find a node's directory of temporary files, and the dashboard",
        "the doctor looks at the free space of /tmp, and not at who reaches the dashboard",
        ("ray._private.worker:_global_node", f"{NODE}.get_temp_dir_path",
         "ray._private.worker:get_dashboard_url"),
    ),
    "train_callbacks": Feature(
        "follow Ray Train's workers: replace them sooner, pause them before a resize",
        "workers are replaced more slowly; a resize repeats the steps since the last checkpoint",
        (f"{EXECUTION}.callback:ControllerCallback", f"{EXECUTION}.callback:WorkerGroupCallback"),
        ("train.elastic:Elastic", "train.failures:DisableRayCheckpointState",
         "train.failures:KillGroupOnFailure", "train.failures:KillOrphanedWorkers",
         "train.network_interface:ChosenInterface", "train.warm_workers:WarmWorkers",
         "tune.placement:PlacementNote"),
    ),
    "single_node": Feature(
        "run Ray Train's controller in the command's process, and no actor beside it",
        "processes of 3 s of a core each at the start; there are no warm workers",
        (f"{CONTROLLER}.run", f"{CONTROLLER}.get_result", f"{CONTROLLER}.get_worker_group",
         f"{POLICY}.after_controller_start", f"{POLICY}._maybe_send_resource_request",
         f"{TRAINER}._create_default_callbacks", f"{TRAINER}._initialize_and_run_controller",
         CURRENT_ACTOR, *UNUSED_CALLBACKS),
        ("train.single_node:single_node_trainer",),
    ),
    "interrupts": Feature(
        "answer Ctrl-C with a checkpoint where Ray Train's controller is an actor",
        "Ray Train's own handler ends the workers; the same command resumes the run",
        (f"{TRAINER}._register_sigint_handler",),
    ),
    "torch_backend": Feature(
        "make no process group for one worker; keep torch's store on the loopback interface",
        "one worker has the threads of a process group; the store listens on all interfaces",
        ("ray.train.torch:TorchConfig.backend_cls", "ray.train.torch.config:_TorchBackend.on_start",
         f"{GROUP}:WorkerGroup.execute", f"{GROUP}:WorkerGroup.execute_single"),
        ("train.single_node:torch_config", "train.loopback:OnLoopback"),
    ),
    "workers": Feature(
        "kill workers, ask whether they live, choose the network interface of several nodes",
        "after a failure Ray waits up to 35 s for the others; gloo and NCCL choose by themselves",
        (f"{GROUP}:WorkerGroup.get_workers", f"{GROUP}:WorkerGroup.execute",
         f"{GROUP}:WorkerGroup.abort", f"{GROUP}:Worker.actor", f"{GROUP}:Worker.metadata",
         f"{GROUP}:ActorMetadata.node_id", f"{GROUP}:RayTrainWorker.get_metadata"),
    ),
    "checkpoint_state": Feature(
        "keep Ray Train from writing its own state into out_dir at each report",
        "it writes a file there; on a full disk that ends the run",
        (f"{EXECUTION}.checkpoint.checkpoint_manager:CheckpointManager._write_state_to_storage",),
    ),
    "train_files": Feature(
        "delete the files that Ray Train leaves in out_dir for itself",
        "they stay there",
        ("ray.train.v2._internal.constants:VALIDATE_STORAGE_MARKER_FILENAME",
         "ray.train.v2._internal.constants:CHECKPOINT_MANAGER_SNAPSHOT_FILENAME"),
    ),
    "preemption": Feature(
        "notice that a node is about to go",
        "no checkpoint is written before it goes",
        (f"{EXECUTION}.context:get_train_context",
         f"{EXECUTION}.context:TrainContext.preemption_context",
         f"{EXECUTION}.preemption:PreemptionContext"),
    ),
    "coordinator": Feature(
        "have the actor that counts nodes look at them every 2 s",
        "new and lost nodes are noticed after up to 20 s",
        ("ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator:"
         "_AutoscalingCoordinatorActor.get_reserved_resources.recompute",),
    ),
    "warm_workers": Feature(
        "start worker processes before they are needed",
        "a worker that died is replaced some seconds later",
        ("ray._private.ray_constants:WORKER_PROCESS_SETUP_HOOK_ENV_VAR",
         "ray.runtime_context:RuntimeContext.get_runtime_env_string",
         f"{GROUP}:WorkerGroup.execute_single_async",
         "ray._private.grpc_utils:init_grpc_channel", f"{RPC}.common_pb2:PYTHON",
         f"{RPC}.node_manager_pb2:PrestartWorkersRequest",
         f"{RPC}.node_manager_pb2_grpc:NodeManagerServiceStub"),
    ),
    "placement_group": Feature(
        "give back the room of a trial whose process was killed",
        "the room stays taken until the sweep's Ray ends",
        (f"{GROUP}:WorkerGroup.get_worker_group_state",
         f"{GROUP}:WorkerGroupState.placement_group_handle",
         f"{GROUP}:DefaultPlacementGroupHandle.placement_group"),
    ),
    "dead_worker": Feature(
        "blame the worker that is gone, not those that missed it",
        "the failed worker of the lowest rank is blamed",
        ("ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError",
         "ray.train.v2._internal.exceptions:WorkerHealthCheckTimeoutError"),
    ),
    "serve_address": Feature(
        "find where a cluster's Serve listens already",
        "the address that is announced is the one of the settings",
        ("ray.serve.context:_get_global_client",),
    ),
    "proxy_callback": Feature(
        "refuse at Serve's proxy what no replica has room for, and what is too large",
        "replicas alone refuse it; the proxy limits neither connections nor bodies",
        ("ray.serve._private.constants:RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",),
        ("serve.proxy:middlewares",),  # which replaces uvicorn.Server, too
    ),
}  # fmt: skip
COORDINATOR_ACTOR = "AutoscalingCoordinator"  # its name and its namespace
NAMES = tuple(dict.fromkeys(name for feature in FEATURES.values() for name in feature.names))


def optional(name: str) -> Any:
    """Return what a private name of Ray's refers to; None if this Ray does not have it."""
    assert name in NAMES, name
    value = resolve(name)
    return None if value is MISSING else value


def has(feature: str) -> bool:
    """Return whether this Ray has all private names of a feature."""
    missing = [name for name in FEATURES[feature].names if resolve(name) is MISSING]
    for name in missing:
        report(name, FEATURES[feature].loss)
    return not missing


@functools.cache
def report(name: str, loss: str) -> None:
    """Log, once in a process, what is lost without a name."""
    logger.debug("this Ray has no %s: %s", name, loss)


@contextlib.contextmanager
def ray_train_ignores_interrupts() -> Iterator[None]:
    """Keep Ray Train from replacing this process's handler of Ctrl-C in this context."""
    has("interrupts")
    with replaced(f"{TRAINER}._register_sigint_handler", do_nothing):
        yield


@contextlib.contextmanager
def minimal_node_services() -> Iterator[None]:
    """Start a node in this context with its GCS, its raylet and their agents alone."""
    has("node_services")  # reports what is missing; the others are left out all the same
    with contextlib.ExitStack() as stack:
        for name in NODE_SERVICES:
            stack.enter_context(replaced(name, do_nothing))
        yield


@contextlib.contextmanager
def kill_node_immediately() -> Iterator[None]:
    """Kill a node's processes in this context: a request to end (SIGTERM) would not reach them."""
    if not has("node_kill"):
        yield
        return
    method = f"{NODE}.kill_all_processes"
    kill = resolve(method)

    def kill_now(node: Any, **options: Any) -> None:
        kill(node, **{**options, "allow_graceful": False})

    with replaced(method, kill_now):
        yield


def init_options(**options: Any) -> dict[str, Any]:
    """Return those of some private options of `ray.init` that it has."""
    has("init_options")
    return {name: value for name, value in options.items() if optional(f"ray:init.{name}")}


def read_authentication_again() -> None:
    """Have this process's Ray read the variables of authentication, which it did when imported."""
    if has("authentication"):
        resolve("ray._raylet:Config").initialize("")
        resolve("ray._raylet:AuthenticationTokenLoader").instance().reset_cache()


def node_temp_dir() -> str:
    """Return the directory in which Ray keeps its files on this node."""
    node = optional("ray._private.worker:_global_node") if has("doctor") else None
    return str(node.get_temp_dir_path()) if node else tempfile.gettempdir()


def dashboard_address() -> str:
    """Return HOST:PORT of the dashboard; empty if there is none."""
    return optional("ray._private.worker:get_dashboard_url")() or "" if has("doctor") else ""


@functools.cache
def callback_base(name: str) -> Any:
    """Return a base class of Ray Train's callbacks, or one that its controller never calls.

    ControllerCallback and WorkerGroupCallback are of its developer interface, without a public
    module.
    """
    from ray.train import UserCallback

    has("train_callbacks")
    return optional(f"{EXECUTION}.callback:{name}") or type(name, (UserCallback,), {})


def worker_actors(worker_group: Any) -> list[Any]:
    return [worker.actor for worker in worker_group.get_workers()] if has("workers") else []


def worker_nodes(worker_group: Any) -> list[str]:
    """Return the id of each worker's node."""
    workers = worker_group.get_workers() if has("workers") else []
    return [worker.metadata.node_id for worker in workers]


def disable_checkpoint_state() -> None:
    """Keep Ray Train, in this process, from writing its own state at each report."""
    if has("checkpoint_state"):
        module = import_module(f"{EXECUTION}.checkpoint.checkpoint_manager")
        module.CheckpointManager._write_state_to_storage = do_nothing


def train_files() -> list[str]:
    """Return the names of the files that Ray Train leaves in out_dir for itself."""
    return [optional(name) for name in FEATURES["train_files"].names if has("train_files")]


def is_node_preempted() -> bool:
    """Return whether a node of this run's workers is about to go.

    Ray's public `get_preemption_info` is a barrier: all workers must call it equally often.
    """
    if not has("preemption"):
        return False
    context = optional(f"{EXECUTION}.context:get_train_context")()
    return bool(context.preemption_context.preemption_info)


def refresh_node_count(run_id: str) -> Any:
    """Have Ray Train look which nodes there are; return the reference of its answer, if any."""
    import ray

    if not has("coordinator"):
        return None
    with contextlib.suppress(Exception):  # Ray by itself looks every 20 s
        coordinator = ray.get_actor(COORDINATOR_ACTOR, namespace=COORDINATOR_ACTOR)
        return coordinator.get_reserved_resources.remote(f"train-{run_id}", True)


def process_setup_hook(function: str) -> dict[str, str]:
    """Return the variable by which Ray calls a function in each new worker process."""
    if not has("warm_workers"):
        return {}
    return {optional("ray._private.ray_constants:WORKER_PROCESS_SETUP_HOOK_ENV_VAR"): function}


def prestart_workers(address: str, job_id: str, count: int, runtime_env: str, keep_s: int) -> None:
    """Ask the raylet at an address for worker processes, made for a job's runtime environment."""
    request = optional(f"{RPC}.node_manager_pb2:PrestartWorkersRequest")(
        language=optional(f"{RPC}.common_pb2:PYTHON"),
        job_id=bytes.fromhex(job_id),
        keep_alive_duration_secs=keep_s,
        num_workers=count,
    )
    request.runtime_env_info.serialized_runtime_env = runtime_env
    request.runtime_env_info.runtime_env_config.setup_timeout_seconds = 600
    request.runtime_env_info.runtime_env_config.eager_install = True
    with optional("ray._private.grpc_utils:init_grpc_channel")(address) as channel:
        stub = optional(f"{RPC}.node_manager_pb2_grpc:NodeManagerServiceStub")(channel)
        stub.PrestartWorkers(request, timeout=10)


def placement_group_id(worker_group: Any) -> str | None:
    """Return the id of the placement group of a group of workers, as hexadecimal digits."""
    if not has("placement_group"):
        return None
    state = worker_group.get_worker_group_state()
    return str(state.placement_group_handle.placement_group.id.hex())


def is_lost_worker(error: BaseException) -> bool:
    """Return whether an error says that a worker is gone, or does not answer."""
    return has("dead_worker") and isinstance(
        error, tuple(optional(name) for name in FEATURES["dead_worker"].names)
    )


def serve_address() -> tuple[str, int] | None:
    """Return where a Serve that runs already listens; Serve says it nowhere else."""
    if not has("serve_address"):
        return None
    client = optional("ray.serve.context:_get_global_client")(raise_if_no_controller_running=False)
    return client and (str(client.http_config.host), int(client.http_config.port))


def main() -> None:
    """Print which private names this Ray has, and what is lost without the others."""
    for feature in FEATURES.values():
        say(f"{feature.use}; without: {feature.loss}")
        for name in feature.names:
            say(f"  {'missing' if resolve(name) is MISSING else 'there':8}{name}")


if __name__ == "__main__":
    main()
