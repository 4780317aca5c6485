"""Runs a command line on hostile files in a process of its own, and says what went wrong.

In: a case. Out: None, or why the answer is not right: a traceback, a signal, a hang, more memory
than a gigabyte, a file that was touched outside. Each command runs in a fork of this process, which
has imported torch already: hundreds of cases in a minute.
"""

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.hostile.cases import Case, copy_of
from yuzogpt import cli

SECONDS = 10  # of the process's own time; a hang is told by the wall clock
WALL_SECONDS = 60  # on a machine that others share
MAX_BYTES = 10**9


@dataclass
class Answer:
    """How a command ended."""

    status: int
    errors: str
    printed: str
    seconds: float  # of the processor
    bytes: int  # resident, at most, beyond what this process had


def answer(command: list[str], home: Path) -> Answer:
    """Run a command line in a fork; a service is asked to stop once it listens."""
    out, err = home.parent / "stdout", home.parent / "stderr"
    before = psutil.Process().memory_info().rss
    child = os.fork()
    if not child:
        status = 70
        try:
            become_command(home, out, err)
            status = cli.exit_status(command)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    deadline, is_asked = time.monotonic() + WALL_SECONDS, False
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        elif command[0] == "serve" and not is_asked and "http://" in read(out):
            os.kill(child, signal.SIGTERM)
            is_asked = True
        time.sleep(0.005)
    return Answer(
        os.waitstatus_to_exitcode(status),
        err.read_text(errors="replace"),
        out.read_text(errors="replace"),
        used.ru_utime + used.ru_stime,
        used.ru_maxrss * 1024 - before,
    )


def read(path: Path) -> str:
    """Return what was written so far."""
    return path.read_text(errors="replace") if path.exists() else ""


def become_command(home: Path, out: Path, err: Path) -> None:
    """Give this process the streams, the home and the limits of a command."""
    for number, path in ((1, out), (2, err)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.update(HOME=str(home), XDG_CACHE_HOME=str(home.parent / "cache"))
    os.chdir(home)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS * 2, SECONDS * 2 + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def fault_of(case: Case, place: Path) -> str | None:
    """Run a case; return what is wrong with its answer, if anything is."""
    home, work = place / "home", place / "work"
    shutil.rmtree(place, ignore_errors=True)
    home.mkdir(parents=True)
    (home / "victim.txt").write_text("mine")
    (work / "out").mkdir(parents=True)
    copy = copy_of(case.original, work / "theirs")
    case.change(copy)
    before = snapshot(home)
    found = answer(case.command(copy, work / "out"), home)
    if fault := wrong(found):
        return fault
    if snapshot(home) != before or {path.name for path in work.iterdir()} != {"out", "theirs"}:
        return "it touched files outside"
    return None


def wrong(found: Answer) -> str | None:
    """Return what is wrong with how a command ended."""
    lines = [line for line in found.errors.splitlines() if not line.startswith(("!!!", "  warn"))]
    own = [line for line in lines if line.startswith("yuzogpt: ")]
    if found.status < 0:
        return f"signal {-found.status} after {found.seconds:.0f} s of CPU: {found.errors[-300:]}"
    if "Traceback" in found.errors + found.printed or found.status not in (0, 1, 2, 143):
        return f"status {found.status}: {found.errors[-1500:]}"
    if found.status in (1, 2) and len(own) != 1:
        return f"status {found.status} with {len(own)} lines: {found.errors[-600:]}"
    if any(len(line) > 2000 or re.search(r"[\x00-\x08\x0b-\x1f]", line) for line in lines):
        return f"a line that is too long or moves the terminal: {found.errors[-600:]!r}"
    if found.seconds > SECONDS:
        return f"{found.seconds:.0f} s of CPU"
    if found.bytes > MAX_BYTES:
        return f"{found.bytes / 1e6:.0f} MB"
    return None


def snapshot(home: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return all that a home holds, with times and contents."""
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes())
        for path in sorted(home.rglob("*"))
        if path.is_file()
    }
