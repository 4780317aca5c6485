"""What `inspect` shows of a corpus, and errors of the disk."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, make_text
from tests.data.test_prepare import run
from tests.data.text_sources import make_documents, write_jsonl
from yuzogpt.data.inspect import SHOWN_CHARACTERS, sample_documents


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
@pytest.mark.parametrize(("characters", "is_cut"), [(5_000, True), (100, False)])
def test_a_document_that_is_cut_is_marked(tmp_path, tokenizer, characters, is_cut):
    text = make_text(characters)
    (tmp_path / "a.txt").write_text(text)
    corpus, _ = run(tmp_path / "a.txt", tmp_path / "1", f"--tokenizer={tokenizer}")
    ((_, shown),) = sample_documents(corpus, 1)
    head = text[: int(characters * 0.9)][:SHOWN_CHARACTERS]
    assert shown == head + (" ..." if is_cut else "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [("a.txt", ["--tokenizer=char"]), ("a.jsonl", ["--tokenizer=gpt2", "--num_workers=0"])],
)
def test_a_full_disk_names_the_file(tmp_path, name, flags):
    """Files may not grow past 20 kB: what a full disk does to writes."""
    path = tmp_path / name
    if name == "a.txt":
        path.write_text(make_text(100_000))
    else:
        write_jsonl(path, make_documents(300))
    arguments = ["prepare", "mine", f"--source={path}", f"--data_dir={tmp_path}/1", *flags]
    command = [sys.executable, "-m", "yuzogpt", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "_", *command]
    result = subprocess.run(limited, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"yuzogpt: {tmp_path}/1/")
    assert line.endswith(": File too large")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
