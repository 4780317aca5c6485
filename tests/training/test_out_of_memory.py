"""Out of memory is one line with what takes less; nothing is tried again."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY, TINY, tiny_settings, yuzogpt
from tests.training.worlds import exit_codes, losses, records, start_world
from yuzogpt import runs
from yuzogpt.errors import RunFailed
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.world import World
from yuzogpt.training.launch import work


@pytest.mark.slow
def test_one_line_names_settings_that_take_less_and_they_work(corpus_dir, tmp_path):
    """As a command whose address space is limited: 16,384 rows at once do not fit into it."""
    flags = [*TINY, f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}", "--n_embd=256"]
    flags += ["--num_workers=0", "--max_iters=1", "--batch_size=16384"]
    flags += ["--gradient_accumulation_steps=1"]
    command = [sys.executable, "-m", "yuzogpt", "train", *flags]
    result = subprocess.run(
        ["sh", "-c", 'ulimit -v 1800000; exec "$@"', "sh", *command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1
    assert "run: out of memory (" in result.stderr
    less = "--batch_size=8192 --gradient_accumulation_steps=2 (the same 16384 rows a step)"
    assert less in result.stderr
    (failure,) = records(tmp_path / "run", "failure")
    assert "out of memory" in failure["text"]


class NoMemory:
    """Lets a rank's device run out of memory in a step; what ranks say on stderr goes to a file."""

    def __init__(self, rank, said):
        self.rank, self.said = rank, said

    def __call__(self, rank):
        # Else it goes to the stderr of the first test that started a world in this process.
        os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        from yuzogpt.model.gpt import GPT

        real = GPT.forward

        def forward(model, *arguments):
            if model.training and rank == self.rank:
                text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79.10 GiB in all"
                raise torch.OutOfMemoryError(text)
            return real(model, *arguments)

        GPT.forward = forward


def test_a_world_ends_when_one_of_it_is_out_of_memory(corpus_dir, tmp_path):
    settings = tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=3")
    assert 0 not in exit_codes(start_world(2, settings, NoMemory(1, tmp_path / "said")))
    said = (tmp_path / "said").read_text()
    assert "WorkerFailed: " in said
    assert "worker 1 is out of memory (2.50 GiB more were requested); it takes less with" in said
    assert "--batch_size=2 --gradient_accumulation_steps=6 (the same 12 rows a step)" in said
    assert not (tmp_path / "run" / runs.FAILED).exists()  # for the next command


def test_workers_that_are_started_again_end_with_the_line(corpus_dir, tmp_path):
    """As Ray starts them; what a command before this one left says nothing."""
    settings = runs.check(tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=3")).settings
    line = "run: worker 1 is out of memory"
    with runs.hold_run_dir(settings) as run:
        (run / runs.FAILED).write(line.encode())
        with pytest.raises(RunFailed, match=line):
            work(settings, World(), lambda *_: None, None, StopRequest())
        (run / runs.FAILED).write(line.encode())
    with runs.hold_run_dir(settings):
        work(settings, World(), lambda *_: None, None, StopRequest())
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]


@pytest.mark.slow
def test_without_a_compiler_training_is_not_compiled_and_says_so(corpus_dir, tmp_path):
    places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}"]
    flags = ["--num_workers=0", "--max_iters=1", "--compile=True"]
    result = yuzogpt("train", *TINY, *places, *flags, CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "compile off: there is no C++ compiler (no-such-compiler)" in result.stdout
