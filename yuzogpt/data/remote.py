"""A prepared corpus in an object store: its blocks are copied to each node once, then mapped.

In: `--data_dir`, a directory or a URI. Out: a directory of this machine. A copy is named by the
corpus's fingerprint, so a corpus that was prepared anew is another copy, and one that two runs
read is the same.
"""

import errno
import hashlib
import os
import uuid
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from yuzogpt.console.terminal import say
from yuzogpt.data.blocks import MANIFEST, TOKENIZER, PreparedCorpus, open_corpus
from yuzogpt.data.manifest import parse_manifest
from yuzogpt.errors import UserError, first_line
from yuzogpt.storage.atomic_files import cache_directory, write_durably
from yuzogpt.storage.filesystems import open_filesystem, scheme_of
from yuzogpt.storage.untrusted import MAX_JSON_BYTES

COPY_BYTES = 2**22  # at a time


def open_anywhere(data_dir: str) -> PreparedCorpus:
    """Open a prepared corpus; one in an object store is first copied to this node's cache.

    Commands that copy at the same moment do no harm: each file appears whole, under its name.
    """
    if not scheme_of(data_dir):
        return open_corpus(Path(data_dir))
    filesystem, inside = open_filesystem(data_dir)
    try:
        with filesystem.open_input_stream(f"{inside}/{MANIFEST}") as stream:
            manifest = stream.read(MAX_JSON_BYTES)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"--data_dir={data_dir}: no prepared corpus there ({first_line(error)})"
        ) from None
    directory = cache_directory() / "corpora" / hashlib.sha256(manifest).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    wanted = parse_manifest(manifest, data_dir)
    sizes = {TOKENIZER: None, **{block.file: block.bytes for block in wanted.blocks}}
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file() or size not in (None, path.stat().st_size):
            say(f"copying {data_dir}/{name} to {directory}")
            copy(filesystem, f"{inside}/{name}", path, data_dir, size or MAX_JSON_BYTES)
    write_durably(directory / MANIFEST, manifest)
    return open_corpus(directory)


def copy(filesystem: fs.FileSystem, inside: str, path: Path, data_dir: str, max_bytes: int) -> None:
    """Copy one file, whole or not at all; what it holds is verified with the corpus.

    UserError if it has more than `max_bytes`.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with filesystem.open_input_stream(inside) as stream, temporary.open("wb") as file:
            while piece := stream.read(COPY_BYTES):
                file.write(piece)
                if file.tell() > max_bytes:
                    raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", inside)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, pa.ArrowInvalid) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--data_dir={data_dir}: {path.name}: {first_line(error)}") from None
