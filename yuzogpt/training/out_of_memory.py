"""Out of memory in training: one line with what would work, and no further attempt.

In: what a library raised. Out: RunFailed where all workers know of it; where only one does, its
line is left in out_dir for the workers that a launcher starts after it.
"""

import contextlib
import re
from collections.abc import Iterator

from yuzogpt.config import TrainSettings
from yuzogpt.console.quantities import in_bytes
from yuzogpt.errors import RunFailed, WorkerFailed, is_out_of_memory
from yuzogpt.runs.directory import FAILED
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import RunStorage


@contextlib.contextmanager
def explained(settings: TrainSettings, world: World, run: RunStorage) -> Iterator[None]:
    """Raise RunFailed, or WorkerFailed in a world of several, if memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        line = explanation(settings, world, str(error))
        if world.size == 1:
            raise RunFailed(line) from None
        with contextlib.suppress(OSError):
            (run / FAILED).write(line.encode())
        raise WorkerFailed(line) from None


def fail_if_a_rank_failed(world: World, run: RunStorage) -> None:
    """Raise RunFailed on all ranks if a worker before these ran out of memory."""
    line: str | None = None
    if world.rank == 0:
        with contextlib.suppress(OSError):
            line = (run / FAILED).read().decode(errors="replace")
    if line := world.broadcast(line):
        raise RunFailed(line)


def explanation(settings: TrainSettings, world: World, reason: str) -> str:
    """Return the line: where, what was asked for, and the settings that need less."""
    rows, ways = settings.batch.global_rows, []
    in_pass = min(settings.batch.batch_size, -(-rows // world.size))
    fewer = next((n for n in range(in_pass // 2, 0, -1) if rows % n == 0), None)
    if fewer:
        ways.append(
            f"--batch_size={fewer} --gradient_accumulation_steps={rows // fewer} (the same "
            f"{rows} rows a step)"
        )
    if not settings.parallel.activation_checkpointing:
        ways.append("--activation_checkpointing=True")
    if world.size > 1 and settings.parallel.parallel != "fsdp":
        ways.append("--parallel=fsdp")
    ways.append("a smaller model")
    where = f"worker {world.rank} is out of memory" if world.size > 1 else "out of memory"
    return (
        f"{settings.run.out_dir}: {where}{wanted(reason)}; it takes less with {', or '.join(ways)}"
    )


def wanted(reason: str) -> str:
    """Return how much memory was asked for, if a library says so."""
    found = re.search(r"tried to allocate ([\d.]+) (bytes|\w+)", reason, re.IGNORECASE)
    if not found:
        return ""
    count, unit = found.groups()
    return f" ({in_bytes(int(count)) if unit == 'bytes' else f'{count} {unit}'} more were wanted)"
