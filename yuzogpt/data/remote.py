"""Opens a corpus in an object store: its blocks are copied to each node once, then mapped.

A copy is named by the corpus's fingerprint, so runs share it, and a corpus that was prepared again
from other text is copied again.
"""

import errno
import hashlib
import os
import uuid
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from yuzogpt.console.terminal import note
from yuzogpt.data.blocks import MANIFEST, TOKENIZER, PreparedCorpus, open_corpus
from yuzogpt.data.manifest import parse_manifest
from yuzogpt.errors import UserError, first_line
from yuzogpt.storage.atomic_files import cache_directory, write_durably
from yuzogpt.storage.filesystems import open_filesystem, scheme_of
from yuzogpt.storage.untrusted import MAX_JSON_BYTES

COPY_CHUNK_BYTES = 2**22


def open_anywhere(data_dir: str) -> PreparedCorpus:
    """Open a prepared corpus; one in an object store is first copied to this node's cache.

    Commands may copy at the same time: each file appears under its name only when it is whole.
    """
    if not scheme_of(data_dir):
        return open_corpus(Path(data_dir))
    filesystem, inside = open_filesystem(data_dir)
    try:
        with filesystem.open_input_stream(f"{inside}/{MANIFEST}") as stream:
            content = stream.read(MAX_JSON_BYTES)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"--data_dir={data_dir}: no prepared corpus there ({first_line(error)})"
        ) from None
    directory = cache_directory() / "corpora" / hashlib.sha256(content).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    manifest = parse_manifest(content, data_dir)
    sizes = {TOKENIZER: None, **{block.file: block.bytes for block in manifest.blocks}}
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file() or size not in (None, path.stat().st_size):
            note(f"copying {data_dir}/{name} to {directory}")
            copy(filesystem, f"{inside}/{name}", path, data_dir, size or MAX_JSON_BYTES)
    write_durably(directory / MANIFEST, content)
    return open_corpus(directory)


def copy(filesystem: fs.FileSystem, inside: str, path: Path, data_dir: str, max_bytes: int) -> None:
    """Copy one file, whole or not at all; its content is verified later, with the corpus.

    UserError if it has more than `max_bytes`.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with filesystem.open_input_stream(inside) as stream, temporary.open("wb") as file:
            while piece := stream.read(COPY_CHUNK_BYTES):
                file.write(piece)
                if file.tell() > max_bytes:
                    raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", inside)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, pa.ArrowInvalid) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--data_dir={data_dir}: {path.name}: {first_line(error)}") from None
