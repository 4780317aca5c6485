"""Tensors on disk: safetensors files, written and hashed in one pass.

In: named tensors, one after the other. Out: a file that any safetensors reader opens, and its
SHA-256. The library's own writer needs all tensors at once and holds Python's lock while it writes.
This one runs beside training, and a tensor may be gathered from the ranks just before its turn.

The format: the length of the header as 8 bytes, the header (JSON: dtype, shape and offsets of each
tensor), then the tensors' bytes end to end. https://github.com/huggingface/safetensors
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yuzogpt.errors import first_line
from yuzogpt.storage.untrusted import DamagedFile, open_regular

if TYPE_CHECKING:  # torch takes seconds to import; errors of the user's are found before that
    from torch import Tensor

DTYPES = {
    "torch.float32": ("F32", 4),
    "torch.float64": ("F64", 8),
    "torch.bfloat16": ("BF16", 2),
    "torch.float16": ("F16", 2),
    "torch.int64": ("I64", 8),
    "torch.int32": ("I32", 4),
    "torch.uint8": ("U8", 1),
    "torch.bool": ("BOOL", 1),
}
CHUNK_BYTES = 2**24


def write_tensors(path: Path, shapes: "Mapping[str, Tensor]", tensors: "Iterable[Tensor]") -> str:
    """Write tensors in the order of `shapes`, synced to disk; return the file's SHA-256.

    `shapes` gives names, dtypes and shapes (meta tensors will do); `tensors` their values.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        start = header(shapes)
        file.write(start)
        digest.update(start)
        for tensor in tensors:
            for chunk in chunks(tensor):
                file.write(chunk)
                digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def header(shapes: "Mapping[str, Tensor]") -> bytes:
    """Return the length and the JSON that come before the tensors."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in shapes.items():
        dtype, width = DTYPES[str(tensor.dtype)]
        start, end = end, end + width * tensor.numel()
        shape = list(tensor.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # so that the tensors are aligned
    return len(content).to_bytes(8, "little") + content


def chunks(tensor: "Tensor") -> Iterator[memoryview]:
    """Yield the bytes of a CPU tensor, some megabytes at a time, without copying them."""
    import torch

    view = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def read_tensors(path: Path) -> "Iterator[tuple[str, Tensor]]":
    """Yield the tensors of a file, memory-mapped: a tensor is read when it is used.

    DamagedFile if it is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    open_regular(path).close()
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)
    except (SafetensorError, AttributeError) as error:  # the latter: a dtype that torch has not
        raise DamagedFile(
            f"{path}: damaged, or not downloaded to its end: {first_line(error)}"
        ) from None
