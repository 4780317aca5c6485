"""The fastest of several ways to compute the same: measured on this machine, and remembered.

In: named candidates, and a key of all that their times depend on. Out: a Choice with the figures
that decided. It is kept in the user's cache, in a file of its own.
"""

import hashlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict

from yuzogpt.console.terminal import LOGGER
from yuzogpt.errors import UserError, reason_of
from yuzogpt.runtime.cores import SPIN_COUNT, USERS_POLICIES, cores_of_time
from yuzogpt.runtime.device import CPU_HAS_BFLOAT16
from yuzogpt.storage.atomic_files import cache_directory, cache_path, to_json, write_durably
from yuzogpt.storage.untrusted import DamagedFile, read_json

FOLDER = "fastest"  # in the cache
MAX_FILE_BYTES = 2**16
BUDGET_S = 1.0  # of a measurement, its first round included
MAX_ROUNDS = 15
MARGIN = 0.03  # the default is kept unless another takes so much less time
MIN_ROUNDS = 3  # in fewer, the margin is WIDE_MARGIN
WIDE_MARGIN = 0.3
STEADY_SHARE = 0.75  # of the rounds must agree; else other programs disturb the measurement
UNSTEADY_MAX_AGE_S = 3600.0  # how long a choice that was disturbed is remembered

Clock = Callable[[], float]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the seconds of each candidate."""

    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")

    key: dict[str, Any]
    name: str
    seconds: dict[str, float]
    is_steady: bool = True


def full_key(subject: str, threads: int, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a measurement depends on: this machine, torch, threads, and `shape`."""
    spins = {name: os.environ.get(name, "") for name in (SPIN_COUNT, *USERS_POLICIES)}
    return {
        "subject": subject,
        "cpu": cpu_name(),
        "bfloat16": CPU_HAS_BFLOAT16,
        "cores": cores_of_time(),
        "threads": threads,
        "torch": torch.__version__,
        "spins": spins,
        "shape": dict(shape),
    }


def cpu_name(system: Path = Path("/")) -> str:
    """Return the model of this machine's CPU, with family and model number where Linux has them."""
    fields: dict[str, str] = {}
    try:
        for line in (system / "proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = [fields[name] for name in ("cpu family", "model") if name in fields]
    return " ".join([fields["model name"], *([f"({'/'.join(numbers)})"] if numbers else [])])


def remembered(key: Mapping[str, Any], names: Iterable[str]) -> Choice | None:
    """Return the choice that was made for a key; None if there is none among these names."""
    try:
        path = file_of(key, cache_path())
        choice = read_json(path, Choice, MAX_FILE_BYTES)
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    except (DamagedFile, UserError) as error:
        LOGGER.debug("no choice is remembered: %s", error)
        return None
    if choice.key != key or choice.name not in choice.seconds or set(choice.seconds) != set(names):
        LOGGER.debug("%s: the choice of something else", path)
        return None
    return choice if choice.is_steady or age < UNSTEADY_MAX_AGE_S else None


def remember(choice: Choice) -> None:
    """Keep a choice in the cache, if it can be written."""
    try:
        path = file_of(choice.key, cache_directory())
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_durably(path, to_json(asdict(choice)), mode=0o600)
    except (OSError, UserError) as error:
        LOGGER.debug("the choice is not remembered: %s", reason_of(error))


def file_of(key: Mapping[str, Any], cache: Path) -> Path:
    """Return the file of a key's choice."""
    return cache / FOLDER / f"{hashlib.sha256(to_json(key)).hexdigest()[:32]}.json"


def measure(
    key: dict[str, Any],
    candidates: Mapping[str, Callable[[], object]],
    default: str,
    clock: Clock = time.perf_counter,
) -> Choice:
    """Call the candidates in turn, round by round, and return the fastest.

    The first round warms up. If it takes the whole budget, it is also the one that counts. Each
    candidate is compared with the default of the same round: other programs slow down both. If the
    rounds do not agree that one is faster, the default is kept.
    """
    warm_up, rounds, started = {}, list[dict[str, float]](), clock()
    for name, candidate in candidates.items():
        warm_up[name] = seconds_of(candidate, clock)
    while len(rounds) < MAX_ROUNDS and clock() - started < BUDGET_S:
        rounds.append({name: seconds_of(call, clock) for name, call in candidates.items()})
    rounds = rounds or [warm_up]
    ratios = {
        name: statistics.median(taken[name] / taken[default] for taken in rounds)
        for name in candidates
    }
    best = min(ratios, key=lambda name: ratios[name])
    seconds = {name: statistics.median(taken[name] for taken in rounds) for name in candidates}
    if best == default or ratios[best] >= 1 - MARGIN:
        return Choice(key, default, seconds)
    margin = MARGIN if len(rounds) >= MIN_ROUNDS else WIDE_MARGIN
    agree = sum(taken[best] < (1 - margin) * taken[default] for taken in rounds)
    is_steady = agree >= STEADY_SHARE * len(rounds)
    return Choice(key, best if is_steady else default, seconds, is_steady)


def seconds_of(call: Callable[[], object], clock: Clock) -> float:
    """Return the seconds of a call."""
    started = clock()
    call()
    return clock() - started
