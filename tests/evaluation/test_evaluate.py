"""`yuzogpt evaluate` as a user runs it: mistakes, a second run, a kill, another batch size."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from tests.conftest import REPOSITORY, prepare_here, yuzogpt
from tests.evaluation.conftest import change_published
from tests.evaluation.models import random_model, write_lambada, write_wikitext
from yuzogpt.cli import exit_status, main
from yuzogpt.config import CorpusSettings
from yuzogpt.evaluation import shards
from yuzogpt.evaluation.benchmarks.readers import Metric
from yuzogpt.evaluation.results import Result, published_figures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_lambada(folder / "lambada_test.jsonl")
    write_wikitext(folder / "wikitext2_test.txt")
    return folder


def command(model, files, out_dir, *flags):
    return ["evaluate", str(model), f"--benchmark_dir={files}", f"--out_dir={out_dir}",
            "--device=cpu", "--threads=1", "--shard_size=8", "--stride=16", *flags]  # fmt: skip


def results(out_dir):
    return json.loads((out_dir / "results.json").read_text())


@pytest.mark.slow
def test_figures_do_not_depend_on_batches_or_on_what_happened(model, files, tmp_path, capsys):
    main(command(model, files, tmp_path / "a", "--num_workers=0", "--batch_size=1"))
    shown = capsys.readouterr().out
    assert "the GPT-2 paper's figures" in shown
    for line in (
        r"lambada +paper +accuracy .* 0\.4599",
        r"wikitext2 +paper +token_perplexity .* 29\.41",
        r"wikitext2, of the paper's figures: taken to be per model.s token",
    ):
        assert re.search(line, shown)
    assert not re.search(r"wikitext2 +paper +perplexity .* 29\.41", shown)
    main(command(model, files, tmp_path / "b", "--num_workers=0", "--batch_size=5"))
    for task, found in results(tmp_path / "a")["tasks"].items():
        other = results(tmp_path / "b")["tasks"][task]
        for name, figure in found["figures"].items():
            assert other["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-4)
            assert other["figures"][name]["counted"] == figure["counted"]

    # A second run computes nothing; one whose shard was cut short computes that shard.
    (shard,) = (tmp_path / "a" / "shards" / "lambada-paper").glob("00002-*.json")
    first, before = results(tmp_path / "a"), shard.stat().st_mtime_ns
    capsys.readouterr()
    main(command(model, files, tmp_path / "a", "--num_workers=0"))
    assert "shards are already computed" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == before
    shard.write_bytes(shard.read_bytes()[:-20])
    main(command(model, files, tmp_path / "a", "--num_workers=0", "--batch_size=1"))
    assert results(tmp_path / "a") == first
    # Another way of counting is another evaluation.
    main(command(model, files, tmp_path / "a", "--num_workers=0", "--stride=32"))
    wikitext = results(tmp_path / "a")["tasks"]["wikitext2"]
    assert wikitext["stride"] == 32
    assert wikitext["figures"]["perplexity"]["value"] != pytest.approx(
        first["tasks"]["wikitext2"]["figures"]["perplexity"]["value"], rel=1e-6
    )


@pytest.mark.slow
def test_mistakes(model, files, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text("[]")
    for arguments, message in {
        ("--tasks=lambda",): "did you mean lambada?",
        ("--tasks=hellaswag",): "hellaswag has only --protocol=harness",
        ("--tasks=ptb", "--protocol=harness"): "ptb has only --protocol=paper",
        ("--tasks=",): "--tasks: none",
        (f"--benchmark_dir={tmp_path / 'empty'}",): "lambada_test.jsonl is missing; put",
        ("--tasks=loss", f"--data_dir={tmp_path / 'empty'}"): "no prepared corpus here",
        (f"--out_dir={__file__}",): "is not a directory; choose another",
        (f"--out_dir={tmp_path / 'mine'}", "--overwrite"): "not the results of an evaluation",
        ("--dtype=auto",): "float32",
        ("--strid=3",): "did you mean stride?",
    }.items():
        result = yuzogpt("evaluate", str(model), f"--out_dir={tmp_path / 'out'}", *arguments)
        assert result.returncode == 2, (arguments, result.stderr)
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_results_of_one_model_stay_together(model, files, tmp_path, capsys):
    out_dir = tmp_path / "out"
    main(command(model, files, out_dir, "--num_workers=0", "--tasks=lambada", "--limit=9"))
    shown = capsys.readouterr().out
    assert "35.13" not in shown  # the paper's figure is of all passages
    lambada = results(out_dir)["tasks"]["lambada"]
    assert (lambada["limit"], lambada["context"], lambada["dtype"]) == (9, 64, "float32")
    main(command(model, files, out_dir, "--num_workers=0", "--tasks=lambada"))
    lambada = results(out_dir)["tasks"]["lambada"]
    assert lambada["figures"]["accuracy"]["counted"] == 40
    main(command(model, files, out_dir, "--num_workers=0", "--tasks=lambada", "--limit=9"))
    assert "keeps the metrics computed without --limit" in capsys.readouterr().out
    assert results(out_dir)["tasks"]["lambada"] == lambada
    harness = ("--tasks=lambada,wikitext2", "--protocol=harness")
    main(command(model, files, out_dir, "--num_workers=0", *harness))
    main(command(model, files, out_dir, "--num_workers=0", "--tasks=wikitext2"))
    found = results(out_dir)["tasks"]
    assert list(found) == ["lambada", "lambada-harness", "wikitext2", "wikitext2-harness"]
    assert found["lambada"] == lambada
    assert found["wikitext2"]["unknown_words"] == found["wikitext2-harness"]["unknown_words"] == 0

    other = random_model(tmp_path / "other", 2)
    refused = yuzogpt(*command(other, files, out_dir, "--num_workers=0"))
    assert refused.returncode == 2
    assert "choose another --out_dir" in refused.stderr
    assert results(out_dir)["tasks"] == found
    main(command(other, files, out_dir, "--num_workers=0", "--tasks=lambada", "--overwrite"))
    assert list(results(out_dir)["tasks"]) == ["lambada"]
    # The same run, trained on: its figures start over.
    random_model(other, 3)
    main(command(other, files, out_dir, "--num_workers=0", "--tasks=wikitext2"))
    assert list(results(out_dir)["tasks"]) == ["wikitext2"]


def shards_in(out_dir):
    """Return the modification time of each shard's file."""
    return {path: path.stat().st_mtime_ns for path in out_dir.glob("shards/*/*.json")}


def test_another_edition_is_read_and_told(model, files, tmp_path, monkeypatch, capsys):
    """The hash is that of the file on the web; there is a WikiText-2 without `<unk>`, too."""
    change_published(monkeypatch, sha256="0" * 64)
    main(command(model, files, tmp_path / "out", "--num_workers=0", "--tasks=wikitext2"))
    assert results(tmp_path / "out")["tasks"]["wikitext2"]["published"] is False
    shown = capsys.readouterr().out
    assert "wikitext2: not the published file" in shown
    assert "29.41" not in shown


def test_a_part_of_a_file_is_told(model, tmp_path, capsys):
    """enwik8 has a hundred million bytes, and its zip one file."""
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", b"The king of night" * 30)
    asked = command(model, tmp_path, tmp_path / "out", "--num_workers=0", "--tasks=enwik8")
    main(asked)
    assert results(tmp_path / "out")["tasks"]["enwik8"]["published"] is False
    assert "1.16" not in capsys.readouterr().out.split("bits_per_byte")[1].splitlines()[0]
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "a") as archive:
        archive.writestr("README", b"about it")
    assert exit_status(asked) == 2
    assert "not a whole zip of one file: it has 2" in capsys.readouterr().err


def test_losses_stand_beside_nanogpts():
    figure = Metric("val_loss", 3.2, 10, "tokens")
    of_openwebtext = Result("loss", [figure], {"corpus": "openwebtext", "limit": 0})
    assert published_figures(of_openwebtext, figure) == (3.12, 2.84, 2.67, 2.54)
    assert (
        published_figures(Result("loss", [figure], {"corpus": "shakespeare", "limit": 0}), figure)
        == ()
    )


@pytest.mark.slow
def test_shards_are_known_by_what_is_in_them(model, files, tmp_path, capsys, monkeypatch):
    out_dir, own = tmp_path / "out", tmp_path / "files"
    shutil.copytree(files, own)
    asked = command(model, own, out_dir, "--num_workers=0", "--tasks=wikitext2")
    main(asked)
    first, before = results(out_dir), shards_in(out_dir)
    main([*asked, "--stride=32"])
    both = shards_in(out_dir)
    assert len(both) > len(before)
    main(asked)  # back again: all of it is there
    assert shards_in(out_dir) == both
    assert results(out_dir) == first
    with monkeypatch.context() as patched:  # another version may score otherwise
        patched.setattr(shards, "__version__", "another")
        main(asked)
    assert len(shards_in(out_dir)) == len(both) + len(before)
    # Scores that are too few, as after a disk that was full, are no scores.
    victim = sorted(before)[1]
    content = json.loads(victim.read_text())
    victim.write_text(json.dumps(content | {"scores": content["scores"][:-1]}))
    main(asked)
    assert results(out_dir) == first
    # Another text of the same name.
    path = own / "wikitext2_test.txt"
    path.write_text(path.read_text().replace("Castle", "Palace"))
    main(asked)
    other = results(out_dir)["tasks"]["wikitext2"]
    assert other["file_sha256"] != first["tasks"]["wikitext2"]["file_sha256"]
    assert other["figures"] != first["tasks"]["wikitext2"]["figures"]
    # Nothing in it.
    path.write_text("")
    capsys.readouterr()
    assert exit_status([*asked, f"--out_dir={tmp_path / 'none'}"]) == 2
    assert "has nothing to score" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    # Half a zip.
    (own / "enwik8.zip").write_bytes(b"PK\x03\x04" + bytes(50))
    assert exit_status([*asked, "--tasks=enwik8"]) == 2
    assert "not a whole zip of one file" in capsys.readouterr().err


def test_loss_on_a_corpus(gpt2_corpus_dir, model, tmp_path):
    flags = ["--tasks=loss", f"--data_dir={gpt2_corpus_dir}", "--loss_windows=10"]
    main(command(model, tmp_path, tmp_path / "out", *flags, "--num_workers=0"))
    figures = results(tmp_path / "out")["tasks"]["loss"]["figures"]
    assert list(figures) == [
        "train_loss", "train_standard_error", "val_loss", "val_standard_error",
    ]  # fmt: skip
    assert figures["train_loss"]["counted"] == 10 * 64
    assert 0 < figures["val_standard_error"]["value"] < figures["val_loss"]["value"]


def test_weights_that_are_no_numbers_are_one_line(gpt2_corpus_dir, tmp_path, capsys):
    damaged = random_model(tmp_path / "run", scale=math.nan)
    flags = ["--tasks=loss", f"--data_dir={gpt2_corpus_dir}", "--num_workers=0"]
    assert exit_status(command(damaged, tmp_path, tmp_path / "out", *flags)) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "yuzogpt: " in one]
    assert "its log probabilities are not finite (loss)" in line
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_the_loss_on_a_whole_corpus_is_not_replaced_by_that_on_a_part(
    gpt2_corpus_dir, text_file, model, tmp_path, capsys
):
    out_dir = tmp_path / "out"
    flags = [f"--data_dir={gpt2_corpus_dir}", "--num_workers=0", "--tasks=loss"]
    asked = command(model, tmp_path, out_dir, *flags)
    main([*asked, "--loss_windows=5"])
    assert results(out_dir)["tasks"]["loss"]["loss_windows"] == 5
    main([*asked, "--loss_windows=0"])
    whole = results(out_dir)["tasks"]["loss"]
    assert whole["loss_windows"] == 0
    capsys.readouterr()
    main([*asked, "--loss_windows=5"])
    assert results(out_dir)["tasks"]["loss"] == whole
    kept = "keeps the metrics computed without --loss_windows=5"
    assert f"loss: {out_dir}/results.json {kept}" in capsys.readouterr().out
    main([*asked, "--loss_windows=0", "--limit=2"])
    assert results(out_dir)["tasks"]["loss"] == whole
    main(asked)  # 2,000 windows: more than there are
    assert results(out_dir)["tasks"]["loss"] == whole
    # Another corpus is another loss.
    other = tmp_path / "corpus"
    (tmp_path / "other.txt").write_text(text_file.read_text()[5000:])
    settings = CorpusSettings(dataset="o", source=str(tmp_path / "other.txt"), tokenizer="gpt2")
    prepare_here(settings, other)
    main([*asked, f"--data_dir={other}", "--loss_windows=5"])
    assert results(out_dir)["tasks"]["loss"]["loss_windows"] == 5


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"my": "own"}',
        '{"model": [], "tasks": {}}',
        '{"model": {"name": 7}, "tasks": {}}',
        '{"model": {"name": "a"}, "tasks": {"lambada": 3}}',
        '{"model": {"name": "a"}, "tasks": {"lambada": {"figures": {"a": {"value": "b"}}}}}',
        '{"model": {"name": "a"}, "tasks": {"lambada": {"figures": {}, "limit": "all"}}}',
        b"\xff\xfe",
        None,
    ],
)
def test_results_that_are_none_are_refused_in_one_line(content, model, files, tmp_path, capsys):
    path = tmp_path / "results.json"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    asked = command(model, files, tmp_path, "--num_workers=0", "--tasks=lambada", "--limit=3")
    assert exit_status(asked) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"yuzogpt: {path}: ")
    assert said.endswith(": not the results of an evaluation; choose another --out_dir\n")
    assert said.count("\n") == 1
    assert not (tmp_path / "shards").exists()
    assert exit_status([*asked, "--overwrite"]) == 2  # it may be the user's own


@pytest.mark.slow
def test_scores_that_are_none_are_computed_again(model, files, tmp_path):
    asked = command(model, files, tmp_path, "--num_workers=0", "--tasks=lambada", "--limit=3")
    main(asked)
    before = results(tmp_path)
    (path,) = shards_in(tmp_path)
    whole = json.loads(path.read_text())
    for bad in (
        "[" * 100_000,
        "7",
        json.dumps(whole | {"scores": [["a", True, True]] * 3}),
        json.dumps(whole | {"scores": [[0.5, True]] * 3}),
        json.dumps(whole | {"scores": [[0.5, 1, {}]] * 3}),
        json.dumps(whole | {"scores": None}),
        json.dumps(whole | {"scores": [[10**400, True, True]] * 3}),
    ):
        path.write_text(bad)
        (tmp_path / "results.json").unlink()
        assert exit_status(asked) == 0
        assert json.loads(path.read_text()) == whole
        assert results(tmp_path) == before


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(model, files, tmp_path):
    """No shard is counted twice: the results are those of an undisturbed run, to the last bit."""
    main(command(model, files, tmp_path / "whole", "--num_workers=0"))
    out_dir = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", *command(model, files, out_dir, "--num_workers=0")],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait, deadline = threading.Event(), time.monotonic() + 60
    while len(list(out_dir.glob("shards/*/*.json"))) < 3:
        assert time.monotonic() < deadline
        wait.wait(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out_dir / "results.json").exists()
    done = shards_in(out_dir)
    main(command(model, files, out_dir, "--num_workers=0"))
    assert results(out_dir) == results(tmp_path / "whole")
    assert {path: shards_in(out_dir)[path] for path in done} == done
