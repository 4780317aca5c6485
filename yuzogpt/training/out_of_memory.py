"""Out of memory in training: one line with settings that need less, and no further attempt.

A single worker raises RunFailed. In a world of several, the failed worker leaves its line in
out_dir, for the workers that a launcher starts after it.
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
def explain_out_of_memory(settings: TrainSettings, world: World, run: RunStorage) -> Iterator[None]:
    """Raise RunFailed, or WorkerFailed in a world of several, if memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        line = out_of_memory_message(settings, world, str(error))
        if world.size == 1:
            raise RunFailed(line) from None
        with contextlib.suppress(OSError):
            (run / FAILED).write(line.encode())
        raise WorkerFailed(line) from None


def check_no_rank_failed(world: World, run: RunStorage) -> None:
    """Raise RunFailed on all ranks if a worker of an earlier attempt ran out of memory."""
    line: str | None = None
    if world.rank == 0:
        with contextlib.suppress(OSError):
            line = (run / FAILED).read().decode(errors="replace")
    if line := world.broadcast(line):
        raise RunFailed(line)


def out_of_memory_message(settings: TrainSettings, world: World, reason: str) -> str:
    """Return the error: where, how much was requested, and settings that need less."""
    rows, options = settings.batch.global_rows, []
    rows_per_pass = min(settings.batch.batch_size, -(-rows // world.size))
    fewer = next((n for n in range(rows_per_pass // 2, 0, -1) if rows % n == 0), None)
    if fewer:
        options.append(
            f"--batch_size={fewer} --gradient_accumulation_steps={rows // fewer} (the same "
            f"{rows} rows a step)"
        )
    if not settings.parallel.activation_checkpointing:
        options.append("--activation_checkpointing=True")
    if world.size > 1 and settings.parallel.parallel != "fsdp":
        options.append("--parallel=fsdp")
    options.append("a smaller model")
    where = f"worker {world.rank} is out of memory" if world.size > 1 else "out of memory"
    return (
        f"{settings.run.out_dir}: {where}{requested_memory(reason)}; it takes less with "
        f"{', or '.join(options)}"
    )


def requested_memory(reason: str) -> str:
    """Return how much memory was requested, if the library's message says so."""
    match = re.search(r"tried to allocate ([\d.]+) (bytes|\w+)", reason, re.IGNORECASE)
    if not match:
        return ""
    count, unit = match.groups()
    return (
        f" ({in_bytes(int(count)) if unit == 'bytes' else f'{count} {unit}'} more were requested)"
    )
