"""Training in a real world: one process a rank, connected by gloo."""

import contextlib
import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

from yuzogpt.config import TrainSettings

# Ranks are forked off a server that has imported torch: new processes, without seconds each.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["yuzogpt.training.launch", "torch._dynamo", "torch.nn.parallel", "matplotlib.pyplot", "pandas"]
)


def run_world(size: int, settings: TrainSettings) -> None:
    """Train as `size` ranks, with the variables that torchrun would set; all must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        FORKSERVER.Process(target=run_rank, args=(rank, size, port, settings.model_dump()))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * size


def run_rank(rank: int, size: int, port: str, settings: dict[str, Any]) -> None:
    """Be one rank."""
    from yuzogpt.training.launch import run_as_rank

    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        run_as_rank(TrainSettings.model_validate(settings))


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind of a run."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    """Return the training loss of each step; each step stands there once."""
    train = records(run, "train")
    by_step = {record["step"]: record["loss"] for record in train}
    assert len(by_step) == len(train)
    return by_step


def weights(run: Path, step: int) -> dict[str, bytes]:
    """Return the content of the tensor files of a checkpoint: equal bytes are equal bits."""
    directory = run / "checkpoints" / f"step-{step}"
    return {
        name: (directory / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    }
