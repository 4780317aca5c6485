"""Ray Train: the training loop on any number of workers.

In: settings with absolute paths, already checked. Out: a finished run in out_dir. Ray starts the
workers, connects them, and starts them again when one dies; which checkpoint they go on from is
read off out_dir by the workers themselves.
"""

import contextlib
import math
import os
import threading
from collections.abc import Mapping
from importlib import import_module
from traceback import format_exception
from typing import Any

from yuzogpt import runs
from yuzogpt.config import TrainSettings, with_changes
from yuzogpt.console.terminal import say
from yuzogpt.errors import Stopped, UserError
from yuzogpt.evaluation.benchmarks.tasks import PreparedTask
from yuzogpt.evaluation.during_training import prepare_tasks
from yuzogpt.orchestration.causes import ours
from yuzogpt.orchestration.cluster import check_reachable, connected, cores_of_nodes
from yuzogpt.orchestration.embedded import is_embedded
from yuzogpt.orchestration.train.worker import ENDS_IN, train_worker
from yuzogpt.runs.event_log import Listener, Record
from yuzogpt.runs.stop_request import keep_asking
from yuzogpt.runtime.cores import available_cores, threads_asked
from yuzogpt.runtime.signals import on_sigterm, sigterm_held_back
from yuzogpt.storage.filesystems import open_filesystem
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.training.progress import Display, take_wandb_key

# Set before ray is imported.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # the end is noticed soon, not after 4 s
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",  # workers that wait for a dead one never leave
}
# Callbacks that come before Ray's own; the others are handed over below.
FIRST_CALLBACKS = (
    "yuzogpt.orchestration.train.failures.KillOrphanedWorkers",
    "yuzogpt.orchestration.train.network_interface.ChosenInterface",
)
# Seconds to find a place for all of an elastic run's workers: when a node is lost, Ray asks for the
# old number first.
PLACED_WITHIN = "5"
SECOND_LINE = 10.0  # seconds that Ray waits longer than our own watchdog for a worker that hangs
HEAVY_IMPORTS = ("torch", "pandas", "pyarrow.dataset")
NEEDED_AT_THE_END = "matplotlib.pyplot"


def run_on_ray(settings: TrainSettings) -> None:
    """Train with Ray Train on an embedded Ray, or on the cluster that the settings name."""
    set_environment()
    key = take_wandb_key(settings.log)
    least, most = settings.workers.span(auto=1)
    timeout = settings.workers.hang_timeout_s + SECOND_LINE
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(timeout))
    if least < most:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", PLACED_WITHIN)
    check_reachable(runs.ray_address(settings))
    exams = prepare_tasks(settings)
    cores = max(available_cores(), most)
    with on_sigterm(leave), contextlib.ExitStack() as stack:
        with sigterm_held_back():  # from the thread of the lease, too
            stack.enter_context(runs.hold_run_dir(settings))
            print("starting Ray ...", flush=True)
            ray = connected(settings.workers.ray_address, cores, HEAVY_IMPORTS, "ray.train.torch")
            stack.enter_context(ray)
        train_connected(settings, key, exams)


def set_environment() -> None:
    """Tell Ray what it reads when it is imported; what the user set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    theirs = os.environ.get("RAY_TRAIN_CALLBACKS", "").split(",")
    all_of_them = dict.fromkeys((*FIRST_CALLBACKS, *filter(None, theirs)))
    os.environ["RAY_TRAIN_CALLBACKS"] = ",".join(all_of_them)


def leave() -> None:
    """Leave what is not training yet, or not any more."""
    raise Stopped("stopped (SIGTERM); the same command resumes it")


def train_connected(
    settings: TrainSettings,
    wandb_key: str | None = None,
    exams: Mapping[str, PreparedTask] | None = None,
) -> None:
    """Train on the Ray that this process is connected to, in an out_dir that it holds."""
    from yuzogpt.runs.event_log import Follower
    from yuzogpt.training.launch import conclude

    run, is_training, is_left = runs.open_run(settings), threading.Event(), threading.Event()

    def stop() -> None:
        follower.catch_up()  # the workers may train for a moment already
        if is_training.is_set():  # in other processes: rank 0 looks for the request in out_dir
            keep_asking(run, "SIGTERM")
        else:  # nobody would look
            is_left.set()
            raise SystemExit  # what Ray's calls hand on, and a controller in this process

    with (
        Display(settings, wandb_key) as display,
        Follower(
            run / runs.METRICS, noting_training(is_training, importing_at_first_step(display))
        ) as follower,
        Follower(run / runs.EVALUATIONS, display),
        on_sigterm(stop),
    ):
        try:
            reason = fit(settings, run, exams=exams)
        except (KeyboardInterrupt, SystemExit):
            if is_left.is_set():
                leave()
            raise
    conclude(settings, reason)


def noting_training(is_training: threading.Event, listener: Listener) -> Listener:
    """Return the listener; `is_training` is set while there are workers in the loop."""

    def listen(record: Record) -> None:
        if record["kind"] == "start":
            is_training.set()
        elif record["kind"] in ("failure", "stop"):
            is_training.clear()
        listener(record)

    return listen


def importing_at_first_step(listener: Listener) -> Listener:
    """Return the listener; while the first steps are made, what only the end needs is imported."""
    importing = threading.Thread(target=import_module, args=(NEEDED_AT_THE_END,), daemon=True)

    def listen(record: Record) -> None:
        if record["kind"] == "train" and importing.ident is None:
            importing.start()
        listener(record)

    return listen


def fit(
    settings: TrainSettings,
    run: RunStorage,
    cpus: float | None = None,
    exams: Mapping[str, PreparedTask] | None = None,
) -> str | None:
    """Run the workers to their end; return why they stopped before it, if they were asked to.

    `cpus`: of each; None: what Ray Train gives. `exams`: for each checkpoint of an evaluation.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.train import (
        FailureConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
        WorkerGroupError,
    )
    from ray.train.torch import TorchTrainer

    from yuzogpt.orchestration.lean import single_node_trainer, torch_config
    from yuzogpt.orchestration.train.elastic import LOOK_EVERY, Elastic
    from yuzogpt.orchestration.train.failures import (
        DisableRayCheckpointState,
        FailureNotice,
        KillGroupOnFailure,
    )
    from yuzogpt.orchestration.train.validation import free_on_one, validation
    from yuzogpt.orchestration.train.warm_workers import HOOK, WarmWorkers
    from yuzogpt.orchestration.tune.placement import PlacementNote
    from yuzogpt.runtime.world import COLLECTIVE_TIMEOUT

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    use_gpu = settings.device.device == "cuda" or (settings.device.device == "auto" and gpus > 0)
    least, most = settings.workers.span(auto=max(1, gpus) if use_gpu else 1)
    what = "GPU" if use_gpu else "CPU"
    check_room(settings, least, what, int(resources.get(what, 0)))
    callbacks: list[Any] = [
        FailureNotice(run, settings),
        KillGroupOnFailure(),
        DisableRayCheckpointState(),
    ]
    if least < most:
        callbacks.append(Elastic(run, settings.workers.hang_timeout_s))
    if ray.get_runtime_context().get_actor_id():  # a trial's process
        callbacks.append(PlacementNote(run.local))
    trainer_class, runtime_env = single_node_trainer() if is_embedded() else TorchTrainer, {}
    # Where Ray's names are others, its controller has a process of its own, which makes no spares.
    if settings.workers.warm_spare_workers and trainer_class is not TorchTrainer:
        callbacks.append(WarmWorkers())
        runtime_env = {"env_vars": HOOK}
    # Ray Train wants checkpoints inside its own folder, so that folder is out_dir. Its state from
    # an earlier attempt is removed: it decides nothing here, and a damaged one would stop it.
    forget(run)
    filesystem, storage = open_filesystem(run.display_name)
    trainer = trainer_class(
        train_worker,
        train_loop_config={"settings": with_threads(settings).model_dump()},
        torch_config=torch_config(
            int(COLLECTIVE_TIMEOUT.total_seconds()), on_loopback=is_embedded()
        ),
        scaling_config=ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, "GPU": 1 if use_gpu else 0} if cpus else None,
            elastic_resize_monitor_interval_s=LOOK_EVERY,
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=storage.rpartition("/")[0] or "/",
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=settings.workers.max_failures,
                max_preemption_failures=settings.workers.max_preemptions,
            ),
            callbacks=callbacks,
            worker_runtime_env=runtime_env,
        ),
        validation_config=validation(
            settings,
            exams or {},
            cores=free_on_one(cores_of_nodes(), math.ceil(most * (cpus or 1))),
            gpus=gpus - most,
        ),
    )
    try:
        result = trainer.fit()
    except SystemExit:  # how Ray Train's handler of Ctrl-C ends, and `stop`, above
        raise KeyboardInterrupt from None
    except (TrainingFailedError, RayActorError) as error:  # the latter: the controller is gone
        if not isinstance(error, WorkerGroupError):  # which FailureNotice has written down
            cause = getattr(error, "controller_failure", error)
            with contextlib.suppress(OSError):
                (run / runs.ERRORS).append("".join(format_exception(cause)).encode())
        see = (run / runs.ERRORS).display_name
        raise ours(error, "run", f"; see {see}") from None
    finally:
        forget(run)
    kind, text = result.return_value
    if kind in ENDS_IN:
        raise ENDS_IN[kind](text)
    return str(text) if text else None


def with_threads(settings: TrainSettings) -> TrainSettings:
    """Return the settings with the user's OMP_NUM_THREADS: Ray's workers have Ray's."""
    threads = settings.device.threads or threads_asked()
    return with_changes(settings, {"device.threads": threads})


def check_room(settings: TrainSettings, workers: int, what: str, have: int) -> None:
    """Say so if not all workers find a place: Ray would wait for one without a word."""
    if workers <= have:
        return
    if not is_embedded():
        say(f"{workers} workers want a {what} each, the cluster has {have}: waiting")
    else:
        raise UserError(f"--num_workers={workers}: this machine has {have} {what}(s), one each")


def forget(run: RunStorage) -> None:
    """Delete what Ray Train wrote into out_dir for itself."""
    for name in (".validate_storage_marker", "checkpoint_manager_snapshot.json"):
        with contextlib.suppress(OSError):
            (run / name).delete()
