"""One worker of Ray Train: runs the training loop, and returns how it ended."""

from typing import Any

from yuzogpt.config import TrainSettings
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.storage.run_storage import WORKER, open_storage

# Errors that a worker returns: raised again by the command.
RETURNED_ERRORS: dict[str, type[Exception]] = {"UserError": UserError, "RunFailed": RunFailed}


def train_worker(config: dict[str, Any]) -> tuple[str, str | None]:
    """Train as one worker; return how it ended, and why.

    Errors that would come again are returned, not raised: Ray would restart the workers.
    """
    import ray.train

    from yuzogpt.orchestration.train.elastic import (
        PAUSES,
        answer_pause,
        preemption,
        wait_to_be_ended,
    )
    from yuzogpt.orchestration.train.reports import Reports
    from yuzogpt.runs.stop_request import StopRequest, stop_source
    from yuzogpt.runtime.world import World
    from yuzogpt.training.launch import work

    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_size=context.get_local_world_size(),
    )
    settings = TrainSettings.model_validate(config["settings"])
    reports = Reports(evaluates=bool(settings.evaluation.eval_tasks))
    run = open_storage(settings.run.out_dir, WORKER)
    # A user's request comes before the launcher's.
    stop = StopRequest(*([stop_source(run)] if world.rank == 0 else []), preemption)
    try:
        reason = work(settings, world, reports, None, stop, is_restarted=True)
    except tuple(RETURNED_ERRORS.values()) as error:
        return type(error).__name__, str(error)
    if reason in PAUSES:
        wait_to_be_ended(run, reason, world.rank)
    # The controller may still ask for a pause, and takes no report until it has an answer.
    reports.finish(meanwhile=lambda: answer_pause(run, world.rank))
    return "ended", reason
