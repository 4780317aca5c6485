"""A text of one's own after the quick start: names, places, and the command that comes next."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.conftest import REPOSITORY, TINY, make_text, prepare_char_corpus
from yuzogpt.cli import exit_status
from yuzogpt.cli.next_steps import after_prepare
from yuzogpt.config import PrepareSettings, TrainSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.data.blocks import open_corpus
from yuzogpt.data.preparation.own_text import is_source, name_of
from yuzogpt.runs.own_corpus import with_own_out_dir


@pytest.fixture
def here(corpus_dir, text_file, tmp_path, monkeypatch):
    """A directory with a text, a corpus `mine`, and a run `out-mine`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(corpus_dir)
    (tmp_path / "book.txt").symlink_to(text_file)
    (tmp_path / "out-mine").mkdir()
    (tmp_path / "out-mine" / "settings.yaml").write_text("data: {dataset: mine}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train mine", "mine: a corpus's name, not a preset; yuzogpt inspect data/mine shows it"),
        ("tune data/mine", "a corpus's directory, not a preset"),
        ("train out-mine", "out-mine: a run, not a preset; see yuzogpt report out-mine"),
        ("train book.txt", "first make a corpus of it: yuzogpt prepare book.txt"),
        ("train --dataset=shakespeare_char_cpu", "a preset, not a corpus's name"),
        ("train --dataset=out-mine", "a run, not a corpus's name"),
        ("prepare shakespeare_char_cpu", "yuzogpt train shakespeare_char_cpu trains it"),
        ("inspect out-mine", "a run, not a corpus's directory; see yuzogpt report out-mine"),
        ("inspect mine", "yuzogpt inspect data/mine"),
        ("report data/mine", "a corpus's directory, not a run"),
        ("report mine", "not a run"),
        ("serve shakespeare_char", "a preset, not a run"),
        ("sample book.txt", "a text, not a run"),
    ],
)
def test_a_name_of_another_kind_is_called_what_it_is(words, message, here, capfd):
    assert exit_status(words.split(" ")) == 2
    said = capfd.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("book.txt", "book"),
        ("/texts/My Book.v2.txt", "My_Book.v2"),
        ("s3://bucket/owt/*.jsonl.zst", "owt"),
        ("logs.jsonl.zst", "logs"),
        ("shakespeare.txt", "shakespeare_text"),  # a named corpus has another source
        ("日本.txt", "text_日本"),
        ("*.txt", "text"),
    ],
)
def test_a_corpus_is_named_after_its_source(source, name):
    assert name_of(source) == name
    assert is_source(source)
    resolve(PrepareSettings, [], [f"--dataset={name}"])  # may be a name


@pytest.mark.parametrize(
    ("words", "dataset", "tokenizer"),
    [
        ("book.txt", "book", "char"),
        ("--source=book.txt", "book", "char"),
        ("book.txt --dataset=other", "other", "char"),
        ("shakespeare_char --source=book.txt", "shakespeare_char", ""),
        ("mine --source=book.txt --tokenizer=gpt2", "mine", "gpt2"),
        ("book.txt --by_line=True", "book", "gpt2"),
        ("folder/*.txt", "folder", "gpt2"),
        ("openwebtext", "openwebtext", ""),
    ],
)
def test_what_prepare_takes_without_being_told(words, dataset, tokenizer, here, capfd):
    assert exit_status(["prepare", *words.split(" "), "--dry_run"]) == 0
    corpus = yaml.safe_load(capfd.readouterr().out)["corpus"]
    assert (corpus["dataset"], corpus["tokenizer"]) == (dataset, tokenizer)


def test_one_model_is_not_given_twice(here, capfd):
    assert exit_status(["sample", "--out_dir=a", "b"]) == 2
    assert capfd.readouterr().err == "yuzogpt: sample b --out_dir=a: one model at a time\n"


def test_a_corpus_in_another_storage_may_have_the_name_of_a_text_here(here, capfd):
    (here / "mine").write_text("a text")
    corpus = here / "shared" / "data" / "mine"
    assert exit_status(["train", "--dataset=mine", f"--storage={here / 'shared'}"]) == 2
    assert f"{corpus}: no prepared corpus here" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("files", "flags", "out_dir"),
    [
        ("", "", "out"),
        ("", "--dataset=book", "out-book"),
        ("shakespeare_char_cpu", "", "out-shakespeare-char-cpu"),
        ("shakespeare_char_cpu", "--dataset=shakespeare_char", "out-shakespeare-char-cpu"),
        ("shakespeare_char_cpu", "--dataset=book", "out-book"),
        ("shakespeare_char_cpu", "--dataset=book --out_dir=out", "out"),
        ("shakespeare_char_cpu", "--dataset=earlier", "out-shakespeare-char-cpu"),
        ("shakespeare_char_cpu told.yaml", "", "told"),
        ("shakespeare_char_cpu untold.yaml", "", "out-book"),
    ],
)
def test_a_run_on_another_corpus_has_a_directory_of_its_own(files, flags, out_dir, here):
    (here / "told.yaml").write_text("data: {dataset: book}\nrun: {out_dir: told}\n")
    (here / "untold.yaml").write_text("dataset: book\n")
    # As an earlier version wrote it, by the same command.
    (here / "out-shakespeare-char-cpu").mkdir()
    (here / "out-shakespeare-char-cpu" / "settings.yaml").write_text("data: {dataset: earlier}\n")
    settings = resolve(TrainSettings, files.split(), flags.split())
    assert with_own_out_dir(with_own_out_dir(settings)).run.out_dir == out_dir


@pytest.mark.parametrize(
    ("characters", "flags", "expected"),
    [
        (20_000, "--dataset=mine", "--dataset=mine"),
        (300, "--dataset=mine", "--dataset=mine --block_size=16"),
        (20_000, "--dataset=shakespeare_char", ""),
        (20_000, "--dataset=mine --data_dir=a/b", "--data_dir=a/b --out_dir=out-mine"),
        (20_000, "--dataset=mine --storage=/s", "--dataset=mine --storage=/s"),
    ],
)
def test_the_next_command_fits_the_corpus(characters, flags, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    (tmp_path / "text").write_text(make_text(characters))
    corpus = open_corpus(prepare_char_corpus(tmp_path / "text", tmp_path / "c"))
    settings = resolve(PrepareSettings, [], flags.split(" "))
    command = f"next: yuzogpt train shakespeare_char_fast {expected}".rstrip()
    assert after_prepare(settings, corpus.manifest) == command


def test_a_dry_run_estimates_what_a_run_takes(here, capfd):
    flags = ["train", *TINY, "--dataset=mine", "--max_iters=50", "--dry_run"]

    def said():
        assert exit_status(flags) == 0
        return capfd.readouterr().out

    tokens = open_corpus(here / "data" / "mine").manifest.tokens("train")
    settings = said()
    assert "# tokens a step: 12 rows x 16 = 192\n" in settings
    assert f"# epochs: {50 * 192 / tokens:.2f}: 50 steps see 9,600 tokens" in settings
    assert "# time: not known" in settings
    (here / "out-mine" / "settings.yaml").write_text(settings)
    line = '{"kind": "train", "step": 9, "tokens_per_second": 1200.0}\n'
    (here / "out-mine" / "metrics.jsonl").write_text(line)
    assert "# time: about 00:00:08, at the 1,200 tokens/s of out-mine" in said()
    flags[-2] = "--dataset=none"
    assert said().startswith("# no estimates: ")


@pytest.mark.slow
def test_own_text_after_a_quick_start(tmp_path):
    """By quickstart.sh with two texts of one name, then by hand: each command printed before."""
    programs = tmp_path / "bin"
    programs.mkdir()
    shell = '#!/bin/sh\n[ $1 = train ] && set -- "$@" --max_iters=2 --num_workers=0\n'
    shell += '[ $1 = sample ] && set -- "$@" --num_samples=1 --max_new_tokens=9\n'
    (programs / "yuzogpt").write_text(f'{shell}exec {sys.executable} -m yuzogpt "$@"\n')
    (programs / "yuzogpt").chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])

    def run(command):
        result = subprocess.run(
            ["sh", "-euc", command], cwd=tmp_path, text=True, check=False,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout
        return result.stdout

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text(make_text(3_000, seed=ord(folder)))
        last = run(f"sh {REPOSITORY / 'quickstart.sh'} {folder}/book.txt")
    assert len(list(tmp_path.glob("out-quickstart-book-*"))) == 2
    prepare = re.findall(r"(yuzogpt prepare) FILE.txt$", last, re.M)[-1]
    (train,) = re.findall("^next: (.*)$", run(f"{prepare} a/book.txt"), re.M)
    (sample,) = re.findall("sample from it: (.*)$", run(train), re.M)
    assert sample == "yuzogpt sample out-book"
    assert "\n---------------\n" in run(sample)
