"""Files as chance or malice leaves them: seeded variants of a whole file.

In: the content of a file that is right. Out: named contents that are not, and things that are no
files at all. The same seed gives the same variants.
"""

import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEEP = "a place for 100,000 brackets"
VALUES: list[Any] = [
    None, True, -1, 0, 3, 2**63, 10**400, 1e300, -1e300, float("nan"), float("inf"), "", "3",
    "x" * 100_000, "../../victim.txt", "/etc/hostname", "a\0b", "\x1b]52;c;bWluZQ==\x07", "\ud800",
    "s3%3A%2F%2Fattack/reader/x", [], {}, [[]], [None], {"a": {"b": []}}, {"": 1}, DEEP,
]  # fmt: skip


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each value lies in a JSON value; of long lists the first alone."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from paths_in(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from paths_in(value[0], (*path, 0))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value with another value in one place."""
    copy = json.loads(json.dumps(value))
    place = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = new
    return copy


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """Return a JSON value without what lies in one place."""
    copy = json.loads(json.dumps(value))
    place = copy
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return copy


def encoded(value: Any) -> bytes:
    """Return a value as JSON, in which it may be nested as deep as no program would."""
    text = json.dumps(value).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.encode("utf-8", errors="surrogatepass")


def json_variants(content: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield `count` JSON files that are not as they should be, and some that are none."""
    value = json.loads(content)
    yield "empty", b""
    yield "cut short", content[: rng.randrange(1, len(content))]
    yield "utf-16", content.decode().encode("utf-16")
    yield "utf-32", content.decode().encode("utf-32")
    yield "deep", encoded({**value, "more": DEEP}) if isinstance(value, dict) else encoded(DEEP)
    yield "deepest", b"[" * 10_000_000
    yield "digits", b'{"format": 1' + b"0" * 100_000 + b"}"
    yield "another root", encoded(rng.choice(VALUES))
    yield "bytes", rng.randbytes(200)
    places = list(paths_in(value))
    for _ in range(count):
        path = rng.choice(places)
        name = ".".join(map(str, path))
        if rng.random() < 0.2:
            yield f"{name} is missing", encoded(without(value, path))
        else:
            new = rng.choice(VALUES)
            yield f"{name} = {repr(new)[:30]}", encoded(changed(value, path, new))


def bytes_variants(content: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield binary files that are not as they should be: cut, longer, with other bytes."""
    yield "empty", b""
    yield "noise", rng.randbytes(len(content))
    yield "longer", content + rng.randbytes(64)
    for _ in range(count):
        kind = rng.choice(["cut", "flip", "head"])
        if kind == "cut":
            cut = rng.randrange(len(content))
            yield f"cut at {cut}", content[:cut]
        else:
            end = len(content) if kind == "flip" else min(len(content), 512)
            place = rng.randrange(end)
            byte = rng.randrange(256)
            yield f"byte {place} = {byte}", content[:place] + bytes([byte]) + content[place + 1 :]


def become_fifo(path: Path) -> None:
    """Nobody will ever write into it."""
    os.mkfifo(path)


def become_endless(path: Path) -> None:
    """It has no end."""
    path.symlink_to("/dev/zero")


def become_socket(path: Path) -> None:
    """Nobody listens; its name may be longer than a socket's."""
    here = os.open(path.parent, os.O_RDONLY)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"/proc/self/fd/{here}/{path.name}")
    listener.close()
    os.close(here)


def become_huge(path: Path) -> None:
    """A file of a terabyte that takes no room."""
    with path.open("wb") as file:
        file.truncate(2**40)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "a FIFO": become_fifo,
    "/dev/zero": become_endless,
    "a socket": become_socket,
    "a directory": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "missing": lambda path: None,
}
