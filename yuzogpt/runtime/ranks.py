"""This process's rank, if torchrun or a similar launcher started it. Does not import torch.

torchrun sets TORCHELASTIC_RUN_ID; similar launchers (srun, Kubeflow) set a WORLD_SIZE above 1. RANK
alone proves nothing: job scripts leave it in the environment of any command.
"""

import contextlib
import os
from dataclasses import dataclass

from yuzogpt.errors import UserError

TORCHRUN = "TORCHELASTIC_RUN_ID"
SIZE = "WORLD_SIZE"
LOOPBACK = "127.0.0.1"  # where the ranks of one machine meet


@dataclass(frozen=True)
class Ranks:
    """The ranks and sizes that torchrun gives a process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def of_torchrun() -> Ranks | None:
    """Return this process's ranks; None unless torchrun or a similar launcher started it."""
    if TORCHRUN not in os.environ and int_variable(SIZE, 1) <= 1:
        return None
    return Ranks(
        rank=int_variable("RANK", 0),
        size=int_variable(SIZE, 1),
        local_rank=int_variable("LOCAL_RANK", 0),
        local_size=int_variable("LOCAL_WORLD_SIZE", 1),
    )


def int_variable(name: str, default: int) -> int:
    """Return an environment variable that holds an integer."""
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise UserError(f"{name}={value}: in the environment, and not a number; unset {name}")
    return int(value)


def are_started_by_torchrun() -> bool:
    """Return whether torchrun itself started this process: it interprets exit statuses."""
    return TORCHRUN in os.environ


def is_first_of_node() -> bool:
    """Return whether this process prints for its node what all of its ranks find."""
    with contextlib.suppress(UserError):
        ranks = of_torchrun()
        return ranks is None or ranks.local_rank == 0
    return True


def without_ranks(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables for a process that is a command of its own, not a rank."""
    return {name: value for name, value in environment.items() if name not in (TORCHRUN, SIZE)}
