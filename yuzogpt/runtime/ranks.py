"""Which of torchrun's ranks this process is, if it is one. Needs no torch.

torchrun sets TORCHELASTIC_RUN_ID; launchers that do the same work (srun, Kubeflow) set a WORLD_SIZE
of more than 1. RANK alone means nothing: job scripts leave it in the environment of any command.
"""

import contextlib
import os
from dataclasses import dataclass

from yuzogpt.errors import UserError

TORCHRUN = "TORCHELASTIC_RUN_ID"
SIZE = "WORLD_SIZE"


@dataclass(frozen=True)
class Ranks:
    """The numbers that torchrun gives a process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def of_torchrun() -> Ranks | None:
    """Return this process's numbers; None unless torchrun, or a launcher like it, started it."""
    if TORCHRUN not in os.environ and number(SIZE, 1) <= 1:
        return None
    return Ranks(
        rank=number("RANK", 0),
        size=number(SIZE, 1),
        local_rank=number("LOCAL_RANK", 0),
        local_size=number("LOCAL_WORLD_SIZE", 1),
    )


def number(name: str, default: int) -> int:
    """Return a variable that holds a number."""
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise UserError(f"{name}={value}: in the environment, and not a number; unset {name}")
    return int(value)


def are_started_by_torchrun() -> bool:
    """Return whether torchrun itself started this process: it reads exit statuses its own way."""
    return TORCHRUN in os.environ


def is_first_of_node() -> bool:
    """Return whether this process speaks for its node: what all ranks find is said once there."""
    with contextlib.suppress(UserError):
        ranks = of_torchrun()
        return ranks is None or ranks.local_rank == 0
    return True


def without_ranks(environment: dict[str, str]) -> dict[str, str]:
    """Return variables for a process that is to be a command of its own, and no rank."""
    return {name: value for name, value in environment.items() if name not in (TORCHRUN, SIZE)}
