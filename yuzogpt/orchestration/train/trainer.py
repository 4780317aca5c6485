"""Ray Train: the training loop on any number of workers.

Settings are checked, and their paths absolute. Ray starts the workers, connects them, and starts
them again when one dies. The workers themselves find in out_dir the checkpoint to resume from.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from traceback import format_exception
from typing import Any, NamedTuple

from yuzogpt import runs
from yuzogpt.config import TrainSettings, with_changes
from yuzogpt.console.terminal import note
from yuzogpt.errors import Stopped, UserError
from yuzogpt.evaluation.benchmarks.readers import PreparedTask
from yuzogpt.evaluation.during_training import prepare_tasks
from yuzogpt.orchestration.causes import as_our_error
from yuzogpt.orchestration.cluster import check_reachable, connected, cores_of_nodes
from yuzogpt.orchestration.embedded import is_embedded, private_directory
from yuzogpt.orchestration.environment import (
    TRAIN,
    TRAIN_ELASTIC,
    TRAIN_HANG_TIMEOUT_S,
    defaults_of,
    prepend_train_callbacks,
    set_defaults,
)
from yuzogpt.orchestration.leftovers import end
from yuzogpt.orchestration.ray_internals import ray_train_ignores_interrupts, train_files
from yuzogpt.orchestration.train.worker import RETURNED_ERRORS, train_worker
from yuzogpt.runs.event_log import Listener, Record
from yuzogpt.runs.stop_request import keep_asking, lost_steps
from yuzogpt.runtime.cores import available_cores, threads_asked
from yuzogpt.runtime.signals import (
    CTRL_C,
    StopSignals,
    announce_stop,
    end_at_once,
    sigterm_held_back,
)
from yuzogpt.storage.filesystems import open_filesystem
from yuzogpt.storage.lease import LOST
from yuzogpt.storage.run_storage import RunStorage
from yuzogpt.training.progress import Display, take_wandb_key

# Callbacks that come before Ray's own; the others are handed over below.
FIRST_CALLBACKS = (
    "yuzogpt.orchestration.train.failures.KillOrphanedWorkers",
    "yuzogpt.orchestration.train.network_interface.ChosenInterface",
)
HANG_MARGIN_S = 10.0  # that Ray waits longer than our own watchdog for a worker that hangs
HEAVY_IMPORTS = ("torch", "pandas", "pyarrow.dataset")
IMPORT_FOR_THE_END = "matplotlib.pyplot"


def run_on_ray(run: runs.ResolvedRun) -> None:
    """Train with Ray Train on an embedded Ray, or on the cluster that the settings name."""
    settings = run.settings
    set_environment()
    key = take_wandb_key(settings.log)
    least, most = settings.workers.span(auto=1)
    waits = {TRAIN_HANG_TIMEOUT_S: str(settings.workers.hang_timeout_s + HANG_MARGIN_S)}
    waits |= TRAIN_ELASTIC if least < most else {}
    check_reachable(runs.ray_address(settings.workers))
    exams = prepare_tasks(settings)
    cores = max(available_cores(), most)
    signals = StopSignals(is_idle, leave, end_with_ray(run.storage))
    with signals, defaults_of(waits), contextlib.ExitStack() as stack:
        with sigterm_held_back():  # from the thread of the lease, too
            stack.enter_context(run.hold())
            note("starting Ray ...")
            ray = connected(settings.workers.ray_address, cores, HEAVY_IMPORTS, "ray.train.torch")
            stack.enter_context(ray)
        train_connected(run, key, exams)


def set_environment() -> None:
    """Set what Ray reads when it is imported; what the user set stays."""
    set_defaults(TRAIN)
    prepend_train_callbacks(FIRST_CALLBACKS)


def is_idle(_reason: str) -> bool:
    """Return False: no worker answers a request to stop."""
    return False


def leave(reason: str) -> None:
    """End the command: no worker trains yet, or any more."""
    if reason == CTRL_C:
        raise KeyboardInterrupt
    raise Stopped("stopped (SIGTERM); the same command resumes it")


def end_with_ray(run: RunStorage) -> Callable[[int], None]:
    """Return what ends this command on a second signal, and the Ray that it started."""

    def clean_up() -> None:
        if is_embedded():
            end(private_directory())

    return lambda number: end_at_once(number, lambda: lost_steps(run, None), clean_up)


def train_connected(
    run: runs.ResolvedRun,
    wandb_key: str | None = None,
    exams: Mapping[str, PreparedTask] | None = None,
) -> None:
    """Train on the Ray that this process is connected to, in an out_dir that it holds."""
    from yuzogpt.runs.event_log import Follower
    from yuzogpt.training.launch import conclude

    settings, storage = run.settings, run.storage
    is_training, has_trained = threading.Event(), threading.Event()
    never_trained: list[str] = []

    def ask(reason: str) -> bool:
        is_heard = has_trained if reason == CTRL_C else is_training
        if not is_heard.is_set():  # the workers may train for a moment already
            follower.catch_up()
        if not is_heard.is_set() or LOST.is_set():  # no worker would see the request
            return False
        keep_asking(storage, reason)  # in other processes: rank 0 finds the request in out_dir
        if reason == CTRL_C:
            announce_stop()
        return True

    def end_fit(reason: str) -> None:
        never_trained.append(reason)
        raise SystemExit  # which passes through Ray's calls and a controller in this process

    try:
        with (
            Display(settings, wandb_key) as display,
            Follower(
                storage / runs.METRICS,
                track_training(is_training, has_trained, import_at_first_step(display)),
            ) as follower,
            Follower(storage / runs.EVALUATIONS, display),
            StopSignals(ask, end_fit, end_with_ray(storage)),  # raises, too, after a dropped signal
        ):
            reason = fit(settings, storage, exams=exams)
    except (KeyboardInterrupt, SystemExit):
        if never_trained:
            leave(never_trained[0])
        raise
    conclude(run, reason)


def track_training(
    is_training: threading.Event, has_trained: threading.Event, listener: Listener
) -> Listener:
    """Return the listener.

    `is_training` is set while there are workers in the loop, `has_trained` once they made a step.
    """

    def listen(record: Record) -> None:
        if record["kind"] == "start":
            is_training.set()
        elif record["kind"] == "first_step":
            has_trained.set()
        elif record["kind"] in ("failure", "stop"):
            is_training.clear()
            has_trained.clear()
        listener(record)

    return listen


def import_at_first_step(listener: Listener) -> Listener:
    """Return the listener; during the first steps, it imports what only the end needs."""
    importing = threading.Thread(target=import_module, args=(IMPORT_FOR_THE_END,), daemon=True)

    def listen(record: Record) -> None:
        if record["kind"] == "train" and importing.ident is None:
            importing.start()
        listener(record)

    return listen


class Placement(NamedTuple):
    """How many workers there are, and what each holds."""

    min_workers: int
    max_workers: int
    use_gpu: bool
    free_gpus: int  # of no worker
    cpus: float | None  # of each worker; None: what Ray Train gives


def fit(
    settings: TrainSettings,
    run: RunStorage,
    cpus: float | None = None,
    exams: Mapping[str, PreparedTask] | None = None,
) -> str | None:
    """Run the workers to their end; return why they stopped before it, if they were asked to.

    `cpus`: of each; None: what Ray Train gives. `exams`: for each checkpoint of an evaluation.
    """
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError

    placement = place_workers(settings, cpus)
    # Ray Train wants checkpoints inside its own folder, so that folder is out_dir. Its state from
    # an earlier attempt is removed: it decides nothing here, and a damaged one would stop it.
    forget(run)
    trainer = make_trainer(settings, run, placement, exams or {})
    try:
        with ray_train_ignores_interrupts():
            result = trainer.fit()
    except SystemExit:  # of `end_fit`, above
        raise KeyboardInterrupt from None
    except (TrainingFailedError, RayActorError) as error:  # the latter: the controller is gone
        raise recorded(error, run) from None
    finally:
        forget(run)
    kind, text = result.return_value
    if kind in RETURNED_ERRORS:
        raise RETURNED_ERRORS[kind](text)
    return str(text) if text else None


def place_workers(settings: TrainSettings, cpus: float | None) -> Placement:
    """Return how many workers there are, and on what; UserError if they find no room here."""
    import ray

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    use_gpu = settings.device.device == "cuda" or (settings.device.device == "auto" and gpus > 0)
    least, most = settings.workers.span(auto=max(1, gpus) if use_gpu else 1)
    resource = "GPU" if use_gpu else "CPU"
    check_room(least, resource, int(resources.get(resource, 0)))
    return Placement(least, most, use_gpu, gpus - most, cpus)


def make_trainer(
    settings: TrainSettings,
    run: RunStorage,
    placement: Placement,
    exams: Mapping[str, PreparedTask],
) -> Any:
    """Return Ray Train's trainer for a run."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from yuzogpt.orchestration.train.elastic import NODE_POLL_INTERVAL_S
    from yuzogpt.orchestration.train.loopback import OnLoopback
    from yuzogpt.orchestration.train.single_node import single_node_trainer, torch_config
    from yuzogpt.orchestration.train.validation import free_cores_on_a_node, validation
    from yuzogpt.orchestration.train.warm_workers import WarmWorkers, setup_hook
    from yuzogpt.runtime.world import COLLECTIVE_TIMEOUT

    least, most, use_gpu, free_gpus, cpus = placement
    callbacks = callbacks_for(settings, run, is_elastic=least < most)
    trainer_class, runtime_env = single_node_trainer() if is_embedded() else TorchTrainer, {}
    # A controller with a process of its own, where Ray's private names differ, keeps none warm.
    if (
        settings.workers.warm_spare_workers
        and trainer_class is not TorchTrainer
        and (hook := setup_hook())
    ):
        callbacks.append(WarmWorkers())
        runtime_env = {"env_vars": hook}
    filesystem, storage = open_filesystem(run.display_name)
    return trainer_class(
        train_worker,
        train_loop_config={"settings": with_threads(settings).model_dump()},
        torch_config=torch_config(
            int(COLLECTIVE_TIMEOUT.total_seconds()), OnLoopback if is_embedded() else None
        ),
        scaling_config=ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, "GPU": 1 if use_gpu else 0} if cpus else None,
            elastic_resize_monitor_interval_s=NODE_POLL_INTERVAL_S,
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
            exams,
            cores=free_cores_on_a_node(cores_of_nodes(), math.ceil(most * (cpus or 1))),
            gpus=free_gpus,
        ),
    )


def callbacks_for(settings: TrainSettings, run: RunStorage, *, is_elastic: bool) -> list[Any]:
    """Return what Ray Train's controller calls besides its own callbacks."""
    import ray

    from yuzogpt.orchestration.train import failures
    from yuzogpt.orchestration.train.elastic import Elastic
    from yuzogpt.orchestration.tune.placement import PlacementNote

    callbacks: list[Any] = [
        failures.FailureNotice(run, settings),
        failures.KillGroupOnFailure(),
        failures.DisableRayCheckpointState(),
    ]
    if is_elastic:
        callbacks.append(Elastic(run, settings.workers.hang_timeout_s))
    if ray.get_runtime_context().get_actor_id():  # a trial's process
        callbacks.append(PlacementNote(run.local))
    return callbacks


def recorded(error: Exception, run: RunStorage) -> Exception:
    """Write why Ray Train ended a run into errors.log; return what to raise for it."""
    from ray.train import WorkerGroupError

    if not isinstance(error, WorkerGroupError):  # which FailureNotice has written down
        cause = getattr(error, "controller_failure", error)
        with contextlib.suppress(OSError):
            (run / runs.ERRORS).append("".join(format_exception(cause)).encode())
    see = (run / runs.ERRORS).display_name
    return as_our_error(error, "run", f"; see {see}")


def with_threads(settings: TrainSettings) -> TrainSettings:
    """Return the settings with the user's OMP_NUM_THREADS: Ray's workers have Ray's."""
    threads = settings.device.threads or threads_asked()
    return with_changes(settings, {"device.threads": threads})


def check_room(workers: int, resource: str, have: int) -> None:
    """Report that not all workers find a place: Ray would wait for it in silence."""
    if workers <= have:
        return
    if not is_embedded():
        note(f"{workers} workers want a {resource} each, the cluster has {have}: waiting")
    else:
        raise UserError(f"--num_workers={workers}: this machine has {have} {resource}(s), one each")


def forget(run: RunStorage) -> None:
    """Delete what Ray Train wrote into out_dir for itself."""
    for name in train_files():
        with contextlib.suppress(OSError):
            (run / name).delete()
