"""A terminal as a person has it: a shell, a keyboard and a screen."""

import os
import re
import sys
import time
from pathlib import Path

import pexpect
import pyte

from tests.conftest import REPOSITORY

PATIENCE_S = 180.0  # a walk that waits longer for what it expects has failed
CTRL_C = "\x03"


class Terminal:
    """A shell in a terminal. Its prompt has the command's number and the last exit status."""

    def __init__(self, directory: Path, columns: int = 140, **environment: str) -> None:
        self.screen = pyte.HistoryScreen(columns, 50, history=20_000)
        self.stream = pyte.ByteStream(self.screen)
        self.columns, self.number = columns, 1
        self.shell = pexpect.spawn(
            "bash",
            ["--norc", "--noprofile"],
            cwd=str(directory),
            dimensions=(50, columns),
            env={
                **{name: value for name, value in os.environ.items() if name != "COLUMNS"},
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(REPOSITORY),
                "TERM": "xterm-256color",
                "PS1": r"[\#:$?]$ ",
                **environment,
            },  # type: ignore[arg-type]
        )
        self.wait_for(r"^\[1:0\]\$")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the window: what still runs in it gets SIGHUP."""
        self.shell.close(force=True)

    def run(self, command: str) -> tuple[int, str]:
        """Run a command to its end; return its exit status and what it showed."""
        self.type(command)
        return self.finish()

    def type(self, line: str) -> None:
        """Type a line; to the shell, if nothing runs in it."""
        self.shell.send(line + "\r")

    def press(self, keys: str) -> None:
        """Press keys, such as CTRL_C."""
        self.shell.send(keys)

    def finish(self) -> tuple[int, str]:
        """Wait for the shell's next prompt; return the exit status and what was shown."""
        prompt = rf"\[{self.number + 1}:(\d+)\]\$"  # perhaps behind a ^C on the same line
        status = int(self.wait_for(prompt)[1])
        shown = re.split(prompt, self.shown())[0]
        self.number += 1
        return status, shown.rstrip()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until what the current command shows has a match of the pattern."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self.shown(), re.M)):
            has_ended = re.search(rf"\[{self.number + 1}:\d+\]\$", self.shown())
            assert not has_ended and time.monotonic() < deadline, f"no {pattern}:\n{self.shown()}"
            try:
                self.stream.feed(self.shell.read_nonblocking(2**16, timeout=1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                raise AssertionError(f"the shell ended:\n{self.shown()}") from None
        return found

    def shown(self) -> str:
        """Return all lines since the current command's prompt, also those that scrolled away."""
        rows = self.screen.history.top
        history = ["".join(row[column].data for column in range(self.columns)) for row in rows]
        text = "\n".join(line.rstrip() for line in [*history, *self.screen.display])
        prompts = [match.start() for match in re.finditer(rf"\[{self.number}:\d+\]\$", text)]
        return text[prompts[-1] :] if prompts else text
