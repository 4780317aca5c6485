"""The private directories of embedded Rays (mode 0700), and what a killed command leaves of one.

They are in the shared temporary directory, in which other users write, too.
"""

import contextlib
import json
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from yuzogpt.errors import UserError
from yuzogpt.orchestration.environment import TOKEN_PATH
from yuzogpt.storage.atomic_files import write_durably
from yuzogpt.storage.lease import StoredHolder, describe_process, is_holder_alive
from yuzogpt.storage.untrusted import read_json

# Whatever TMPDIR says: the path of a Unix socket, of which Ray makes some, has at most 107 bytes.
SHARED_DIRECTORY = Path("/tmp")
PREFIX = "yuzogpt-ray-"
OWNER = "owner.json"  # the process of the directory's command
MAX_OWNER_BYTES = 2**16


def make_directory() -> Path:
    """Make the directory of an embedded Ray of this process, of mode 0700."""
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=SHARED_DIRECTORY))
    write_durably(directory / OWNER, json.dumps(describe_process(os.getpid())).encode())
    return directory


def sweep() -> None:
    """End what is left of embedded Rays whose command was killed: processes and directories.

    Others can put anything into the shared directory. What is not plainly ours is left alone.
    """
    for directory in SHARED_DIRECTORY.glob(f"{PREFIX}*"):
        if is_left_over(directory):
            end(directory)


def is_left_over(directory: Path) -> bool:
    """Return whether a directory is this user's own, and the command that made it is gone."""
    try:
        with opened(directory) as handle:
            status = os.fstat(handle)
            if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
                return False
            owner = read_json(directory / OWNER, StoredHolder, MAX_OWNER_BYTES, follow_links=False)
        return is_holder_alive(owner.model_dump()) is False
    except (OSError, UserError):
        return False


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[int]:
    """Open a directory itself, never what a symbolic link leads to; OSError if it is none."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def end(directory: Path) -> None:
    """End an embedded Ray's processes, and delete its directory; last the file `sweep` needs."""
    for process in processes_of(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    with contextlib.suppress(OSError), opened(directory) as handle:
        with os.scandir(handle) as entries:
            names = sorted((entry.name for entry in entries), key=OWNER.__eq__)
        for name in names:
            remove(name, handle)
        directory.rmdir()


def remove(name: str, handle: int) -> None:
    """Delete a file, a symbolic link or a whole folder in a directory, as far as possible."""
    with contextlib.suppress(OSError):  # another command may be at it, too
        if stat.S_ISDIR(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode):
            shutil.rmtree(name, ignore_errors=True, dir_fd=handle)
        else:
            os.unlink(name, dir_fd=handle)


def processes_of(directory: Path) -> list[int]:
    """Return the processes of an embedded Ray: all inherited the path of its token.

    Ray's agents overwrite it with their titles; they are found by the logs that they have open.
    """
    mark, processes = os.fsencode(f"{TOKEN_PATH}={directory}/token"), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_marked = mark in (process / "environ").read_bytes()
            if is_marked or is_agent_in(directory, process):
                processes.append(int(process.name))
    return processes


def is_agent_in(directory: Path, process: Path) -> bool:
    """Return whether a process (its folder in /proc) is Ray's, with files open in a directory."""
    if not (process / "cmdline").read_bytes().startswith(b"ray::"):
        return False
    for file in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if file.readlink().is_relative_to(directory):
                return True
    return False
