"""Files that somebody else may have written: checked here, in one place, before they are used.

In: a path, or bytes that came from one. Out: the bytes of a regular file of bounded size, or JSON
that fits a schema. Anything else is a DamagedFile: one line that names the file.
"""

import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from yuzogpt.errors import UserError, reason_of

MAX_JSON_BYTES = 2**28
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Schema = TypeVar("Schema")


class DamagedFile(UserError):
    """A file that is not what its reader needs: damaged, or made by somebody else."""


class Untrusted(BaseModel):
    """A schema of JSON from disk: exact types; fields that it does not name are left out."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def open_regular(path: Path, origin: str = "", *, follow_links: bool = True) -> BufferedReader:
    """Open a file for reading if it is a regular one; a FIFO, a socket or a device would block.

    `origin`: its name in messages; default: the path. `follow_links`: False refuses a symbolic link
    (OSError). FileNotFoundError if there is no file, OSError if it may not be read, DamagedFile if
    it is not a regular file.
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
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise DamagedFile(f"{origin or path}: {size:,} bytes, at most {max_bytes:,} are read")
        return file.read(size)


def read_json(
    path: Path,
    schema: type[Schema],
    max_bytes: int = MAX_JSON_BYTES,
    origin: str = "",
    *,
    follow_links: bool = True,
) -> Schema:
    """Return the JSON of a file that fits `schema` (a pydantic model, or any annotated type).

    FileNotFoundError if there is no file, DamagedFile if anything else is wrong.
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
    """Return JSON that fits `schema`; otherwise DamagedFile, which begins with `origin`.

    It must be UTF-8, with or without a byte order mark, and nested at most 200 deep: pydantic's
    parser refuses more, as it does numbers of thousands of digits.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return TypeAdapter(schema).validate_json(text)
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{origin}: byte {error.start} is not UTF-8") from None
    except ValidationError as error:
        raise DamagedFile(f"{origin}: {first_mistake(error)}") from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise DamagedFile(f"{origin}: {reason_of(error)}") from None


def checked(value: Any, schema: type[Schema], origin: str) -> Schema:
    """Return a value that was read already and fits `schema`; otherwise DamagedFile."""
    try:
        return TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        raise DamagedFile(f"{origin}: {first_mistake(error)}") from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise DamagedFile(f"{origin}: {reason_of(error)}") from None


def load_json(content: bytes | str, origin: str) -> Any:
    """Return the value of any JSON; DamagedFile if it is not JSON, as `parse_json`."""
    return parse_json(content, Any, origin)


def first_mistake(error: ValidationError) -> str:
    """Return what is wrong with a value, and where in it."""
    mistake = error.errors(include_url=False, include_input=False)[0]
    if mistake["type"] == "json_invalid":
        is_deep = "recursion limit" in mistake["msg"]
        return "nested too deeply" if is_deep else mistake["msg"].replace("Invalid", "not", 1)
    key = ".".join(str(part) for part in mistake["loc"] if part != "[key]")
    shown = key if key.isprintable() else repr(key)  # somebody else wrote it
    is_odd = mistake["type"] == "string_pattern_mismatch"  # the pattern itself explains nothing
    reason = "not a name or value that is accepted here" if is_odd else mistake["msg"]
    return f"{shown[:200]}: {reason}" if key else reason
