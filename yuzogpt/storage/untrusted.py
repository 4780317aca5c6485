"""Files that somebody else may have written: checked here, in one place, before they are used.

In: a path, or bytes that came from one. Out: the bytes of a regular file of bounded size, or JSON
that fits a schema. Anything else is a DamagedFile: one line that names the file.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from yuzogpt.errors import UserError, reason_of

MAX_JSON_BYTES = 2**28
MAX_JSON_DEPTH = 64  # ours has 6 levels, Hugging Face's tokenizer.json about 8

Schema = TypeVar("Schema")


class DamagedFile(UserError):
    """A file that is not what its reader needs: damaged, or made by somebody else."""


class Untrusted(BaseModel):
    """A schema of JSON from disk: exact types; fields that it does not name are left out."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def open_regular(path: Path, origin: str = "", *, follow_links: bool = True) -> BinaryIO:
    """Open a file for reading if it is a regular one; a FIFO, a socket or a device would block.

    `origin`: what messages call it, if not by its path. `follow_links`: False refuses a symbolic
    link (OSError). FileNotFoundError if there is none, OSError if it may not be read, DamagedFile
    if it is something else.
    """
    follow = 0 if follow_links else os.O_NOFOLLOW
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | follow)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise DamagedFile(f"{origin or path}: not a regular file")


def read_file(
    path: Path, max_bytes: int = MAX_JSON_BYTES, origin: str = "", *, follow_links: bool = True
) -> bytes:
    """Return the content of a regular file of at most `max_bytes`; errors as of `open_regular`."""
    with open_regular(path, origin, follow_links=follow_links) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DamagedFile(f"{origin or path}: more than {max_bytes:,} bytes")
    return content


def read_json(
    path: Path,
    schema: type[Schema],
    max_bytes: int = MAX_JSON_BYTES,
    origin: str = "",
    *,
    follow_links: bool = True,
) -> Schema:
    """Return the JSON of a file as `schema` has it (a pydantic model, or any annotated type).

    FileNotFoundError if there is none, DamagedFile for anything else that is wrong.
    """
    origin = origin or str(path)
    try:
        content = read_file(path, max_bytes, origin, follow_links=follow_links)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(f"{origin}: not readable: {reason_of(error)}") from None
    return parse_json(content, schema, origin)


def parse_json(content: bytes | str, schema: type[Schema], origin: str) -> Schema:
    """Return JSON as `schema` has it; DamagedFile, which begins with `origin`, if it is not so."""
    value = load_json(content, origin)
    try:
        return TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        raise DamagedFile(f"{origin}: {first_mistake(error)}") from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise DamagedFile(f"{origin}: {reason_of(error)}") from None


def load_json(content: bytes | str, origin: str) -> Any:
    """Return the value of JSON in UTF-8, of bounded depth; DamagedFile if it is none.

    `json.loads` would take bytes for UTF-16 or UTF-32 if they look so.
    """
    try:
        value = json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{origin}: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise DamagedFile(f"{origin}: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise DamagedFile(f"{origin}: not JSON: {reason_of(error)}") from None
    if is_deeper_than(value, MAX_JSON_DEPTH):
        raise DamagedFile(f"{origin}: nested too deeply")
    return value


def is_deeper_than(value: Any, depth: int) -> bool:
    """Return whether lists and objects lie in each other more than `depth` deep."""
    layer = [value]
    for _ in range(depth):
        nested = [item for item in layer if isinstance(item, dict | list)]
        if not nested:
            return False
        layer = [
            item
            for container in nested
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
    return bool(layer)


def first_mistake(error: ValidationError) -> str:
    """Return what is wrong with a value, and where in it."""
    mistake = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, mistake["loc"]))[:200]
    return f"{place}: {mistake['msg']}" if place else mistake["msg"]
