"""Preparation takes little memory, whatever the source's files hold."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY, make_text
from tests.data.text_sources import write_parquet
from yuzogpt.data.blocks import open_corpus

MEASURED = """
import re, sys
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
"""
PREPARE = """
from yuzogpt.cli import main
try:
    main(sys.argv[1:])
finally:
    print(peak())
"""
WRITE = """
import numpy as np
from yuzogpt.data.block_writer import BlockWriter, list_array

documents = list_array([np.full(1000, 7, np.uint16)] * 250, np.uint16)
writer = BlockWriter(Path(sys.argv[1]), "train", 2**23, lambda n: f"train-{n:05d}.arrow")
before = peak()
for _ in range(100):
    writer.add(documents)
assert len(writer.finish()) == 3
print(peak() - before)
"""


def peak_mb(script: str, *arguments: str) -> float:
    """Run a script in a process of its own; return what it prints last: megabytes of memory."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURED + script, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return float(result.stdout.splitlines()[-1])


def prepare_mb(source: Path, directory: Path, *flags: str) -> float:
    """Prepare a corpus; return the peak of resident memory in megabytes."""
    places = [f"--source={source}", f"--data_dir={directory}"]
    command = ["prepare", "mine", "--tokenizer=gpt2", "--num_workers=0", *places, *flags]
    return peak_mb(PREPARE, *command)


@pytest.fixture(scope="module")
def least(tmp_path_factory):
    """What a preparation of next to nothing takes."""
    folder = tmp_path_factory.mktemp("least")
    return prepare_mb(write_parquet(folder / "web", ["one"], files=1), folder / "corpus")


@pytest.mark.slow
def test_one_large_row_group(least, tmp_path):
    """All is read and hashed; that nothing is tokenized saves the test's time alone."""
    table = pa.table({"text": [make_text(20_000, seed) for seed in range(20)] * 300})
    (tmp_path / "web").mkdir()
    pq.write_table(
        table, tmp_path / "web" / "a.parquet", row_group_size=10**6, compression="none",
        use_dictionary=False,
    )  # fmt: skip
    peak = prepare_mb(tmp_path / "web", tmp_path / "corpus", "--max_document_bytes=1000")
    assert open_corpus(tmp_path / "corpus").manifest.rejected == {"too long": 6_000}
    assert peak - least < 100  # of 120 MB


@pytest.mark.slow
def test_a_large_text_file(least, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(make_text(1_000_000) * 16)
    (tmp_path / "books" / "b.txt").write_text("short")
    peak = prepare_mb(tmp_path / "books", tmp_path / "corpus")
    assert open_corpus(tmp_path / "corpus").manifest.source["documents"] == 2
    assert peak - least < 60  # 16 MB, and all that was made of it, took more


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_line_that_is_large_once_it_is_decompressed(least, tmp_path, suffix):
    path = tmp_path / "web" / f"a.jsonl{suffix}"
    path.parent.mkdir()
    codec = {".zst": "zstd", ".gz": "gzip"}[suffix]
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(100):
            file.write(b"a " * 500_000)
        file.write(b'"}\n{"text": "last"}\n')
    assert path.stat().st_size < 300_000
    peak = prepare_mb(path.parent, tmp_path / "corpus")
    manifest = open_corpus(tmp_path / "corpus").manifest
    assert manifest.rejected == {"too long": 1}
    assert manifest.tokens("train") + manifest.tokens("val") == 4
    assert peak - least < 60  # of 100 MB


def test_blocks_are_written_from_the_memory_that_gathers_them(tmp_path):
    assert peak_mb(WRITE, str(tmp_path)) < 45  # a block has 17 MB


def test_a_preparation_on_ray_does_without_torch():
    """Torch would be two thirds of what the command takes itself: 180 MB, and 3 s of its start."""
    script = "import sys, yuzogpt.orchestration.data.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)
