"""Training in a real world: one process a rank, connected by gloo."""

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.waiting import wait_until
from yuzogpt import runs
from yuzogpt.config import TrainSettings
from yuzogpt.runs.event_log import Listener, read_records
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.world import World

Fault = Callable[[int], None]

# Ranks are forked off a server that has imported torch: new processes, without seconds each.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "yuzogpt.training.launch",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.nn.parallel",
        "matplotlib.pyplot",
        "pandas",
    ]
)


def run_world(size: int, settings: TrainSettings) -> None:
    """Train as `size` ranks, with the variables that torchrun would set; all must succeed."""
    assert exit_codes(start_world(size, settings)) == [0] * size


def start_world(
    size: int, settings: TrainSettings, fault: Fault | None = None
) -> "list[multiprocessing.process.BaseProcess]":
    """Start the ranks of a world; `fault` is called in each with its rank before it trains."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    said = settings.model_dump(exclude_unset=True)  # as flags would say it
    ranks = [
        FORKSERVER.Process(target=run_rank, args=(rank, size, port, said, fault))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


def exit_codes(ranks: "list[multiprocessing.process.BaseProcess]") -> list[int | None]:
    """Wait for the ranks to end, and return what they ended with."""
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def run_rank(
    rank: int, size: int, port: str, settings: dict[str, Any], fault: Fault | None
) -> None:
    """Be one rank."""
    from yuzogpt.training import launch

    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if fault:
        fault(rank)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        launch.run_as_rank(TrainSettings.model_validate(settings))


class Slow:
    """Makes each forward pass of a rank take a while; steps that take as long count as long."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: how long."""
        self.seconds = seconds

    def __call__(self, rank: int) -> None:
        """Be the fault of a rank."""
        from yuzogpt.model.gpt import GPT
        from yuzogpt.training import loop

        loop.LONG_STEP_S = self.seconds
        real = GPT.forward

        def forward(model: GPT, *arguments: Any) -> Any:
            time.sleep(self.seconds * model.training)
            return real(model, *arguments)

        GPT.forward = forward  # type: ignore[method-assign]


def train_here(settings: TrainSettings, listener: Listener | None = None) -> None:
    """Train as the only worker, in this process."""
    from yuzogpt.training.launch import work

    checked = runs.check(settings).settings
    with runs.hold_run_dir(checked):
        work(checked, World(), lambda *_: None, listener, StopRequest())


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind of a run."""
    return [record for record in read_records(run / "metrics.jsonl") if record["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    """Return the training loss of each step; each step stands there once."""
    train = records(run, "train")
    by_step = {record["step"]: record["loss"] for record in train}
    assert len(by_step) == len(train)
    return by_step


def weights(run: Path, step: int) -> dict[str, bytes]:
    """Return the content of the tensor files of a checkpoint: equal bytes are equal bits."""
    files = (run / "checkpoints" / f"step-{step}").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


def wait_for_step(run: Path, step: int) -> int:
    """Wait until a run has made a step; return how far it is."""

    def made() -> int:
        last = ([0] + [record["step"] for record in records(run, "train")])[-1]
        return int(last) if last >= step else 0

    return wait_until(made)


def wait_for_start(run: Path, number: int, steps: int) -> int:
    """Wait until the loop of a run was started so often, and made so many steps since."""

    def made() -> int:
        found = read_records(run / "metrics.jsonl")
        starts = [index for index, record in enumerate(found) if record["kind"] == "start"]
        since = found[starts[number - 1] :] if len(starts) >= number else []
        steps_made = [record["step"] for record in since if record["kind"] == "train"]
        return int(steps_made[-1]) if len(steps_made) >= steps else 0

    return wait_until(made)
