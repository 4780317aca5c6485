"""Help, search, version, list and completion."""

import shutil
import subprocess
from importlib import metadata

import pytest

from tests.conftest import prepare_char_corpus
from yuzogpt.cli import VERBS, exit_status
from yuzogpt.cli.completion import script
from yuzogpt.cli.help import verb_help
from yuzogpt.config import SampleSettings
from yuzogpt.config.resolve import leaves, preset_names, preset_summary, resolve
from yuzogpt.runs.event_log import record_of
from yuzogpt.storage.atomic_files import to_json
from yuzogpt.storage.lease import Lease
from yuzogpt.storage.run_storage import LocalStorage


def said_by(words, capfd):
    assert exit_status(words.split(" ")) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_the_terminal_and_has_everything(verb, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    *settings, examples = verb_help(verb).split("\nexamples:\n")
    longest = max(settings[0].splitlines() if settings else examples.splitlines(), key=len)
    assert len(longest) <= columns
    for dotted, _ in leaves(VERBS[verb].schema):
        assert f"--{dotted.split('.')[1]}=" in verb_help(verb)
    assert all(f"  {name}" in verb_help(verb) for name in VERBS[verb].preset_names)


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_help_are_commands(verb, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("text")
    (tmp_path / "mine.yaml").write_text("")
    for example in VERBS[verb].examples:
        words = ["sh", "-c", f"printf '%s\\n' {example.partition(' > ')[0]}"]
        arguments = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert exit_status([verb, *arguments.splitlines(), "--dry_run"]) == 0, capfd.readouterr()


def test_every_preset_says_what_it_is_in_one_line():
    for name in preset_names():
        assert 20 < len(preset_summary(name)) < 95
        assert not preset_summary(name).endswith((",", ":", ";"))


@pytest.mark.parametrize("words", ["help train warmup", "train --help WARMUP", "help warmup"])
def test_help_can_be_searched(words, capfd):
    found = said_by(words, capfd)
    assert "--warmup_iters=" in found
    assert "--n_layer" not in found
    assert found.count("--warmup_iters=") == 1


def test_what_no_help_has_is_a_mistake(capfd):
    assert exit_status(["help", "sample", "temprature"]) == 2
    assert "did you mean temperature?" in capfd.readouterr().err


def test_the_version_is_said(capfd):
    assert said_by("--version", capfd).startswith(f"yuzogpt {metadata.version('yuzogpt')}, ")


def test_list_shows_what_is_there(corpus_dir, text_file, tmp_path, capfd):
    prepare_char_corpus(text_file, tmp_path / "data" / "book")
    states = {
        "out-done": [record_of("train", 9), record_of("final", 9, val_loss=1.5)],
        "out-killed": [record_of("evaluation", 5, val_loss_estimate=2.25), record_of("train", 7)],
        "out-stopped": [record_of("train", 3), record_of("stop", 3)],
        "out-now": [record_of("start", 0)],
    }
    for name, records in states.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.yaml").write_text("data: {dataset: book}\n")
        lines = b"".join(to_json(record).replace(b"\n", b"") + b"\n" for record in records)
        (tmp_path / name / "metrics.jsonl").write_bytes(lines)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "hub" / "model.safetensors").symlink_to(tmp_path / "gone")
    with Lease(LocalStorage(tmp_path / "out-now")):
        said = said_by(f"list {tmp_path}", capfd)
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in said.splitlines() if line}
    assert rows["out-done"] == "book finished 9 1.5000"
    assert rows["out-killed"] == "book not finished 7 about 2.2500"
    assert rows["out-stopped"] == "book stopped 3"
    assert rows["out-now"] == "book running 0"
    assert rows["data/book"].startswith("char, ")
    assert "gpt2_124m" in rows


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ser", "serve"),
        ("train --max_it", "--max_iters="),
        ("train shakespeare_char_c", "shakespeare_char_cpu"),
        ("train --pos_emb = ro", "rotary"),
        ("report out-b", "out-book"),
        ("sample --prompts = out-b", "out-book"),
    ],
)
def test_bash_completes(words, expected, tmp_path):
    (tmp_path / "out-book").mkdir()
    program = f"{script('bash', VERBS)}\nCOMP_WORDS=(yuzogpt {words})\n"
    program += 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _yuzogpt; echo "${COMPREPLY[@]}"\n'
    result = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert result.stdout.strip() == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completions_of_other_shells_can_be_read(shell, tmp_path):
    assert "--max_iters" in script(shell, VERBS) or "-l max_iters" in script(shell, VERBS)
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not here")
    (tmp_path / "script").write_text(script(shell, VERBS))
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_line_ends_are_written_as_help_shows_them():
    flags = [r"--start=\n", r"--start=a\tb", r"--start=\\n", "--start=é\\x", r"--start=FILE:\n"]
    found = [resolve(SampleSettings, [], [flag]).sampling.start for flag in flags]
    assert found == ["\n", "a\tb", r"\n", "é\\x", r"FILE:\n"]
