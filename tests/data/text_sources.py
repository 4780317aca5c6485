"""Sources for the tests: documents of real words, as parquet, JSON lines or plain text."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import make_text


def make_documents(count: int, seed: int = 0, characters: int = 400) -> list[str]:
    """Return documents of very different lengths."""
    generator = random.Random(seed)
    lengths = [int(characters * generator.expovariate(1)) + 1 for _ in range(count)]
    text = make_text(max(lengths) + 1000, seed)
    starts = [generator.randrange(1000) for _ in range(count)]
    return [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def write_parquet(
    folder: Path, documents: list[str], files: int = 4, rows_per_group: int = 50
) -> Path:
    """Write documents to parquet files, in order; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    step = -(-len(documents) // files)
    for index in range(files):
        part = documents[index * step : (index + 1) * step]
        path = folder / f"part-{index:03d}.parquet"
        pq.write_table(pa.table({"text": part}), path, row_group_size=rows_per_group)
    return folder


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """Write documents as JSON lines, compressed as the name says."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(content, codec="zstd", asbytes=True))
    else:
        path.write_bytes(content)
    return path
