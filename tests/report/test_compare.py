"""`yuzogpt report A B`: curves overlaid, figures side by side, and the settings that differ."""

import pytest

from tests.report.test_report import RESTARTED, other, start, steps, write
from yuzogpt.cli import exit_status, main

YAML = "run: {{out_dir: {0}}}\noptimizer: {{learning_rate: {1}}}\n"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = [start(50, 0), *steps(52, 1, 9), other("evaluation", 80, 9, val_loss_estimate=3.5)]
    for name, records, rate in (("a", RESTARTED, 1e-3), ("b", short, 3e-3)):
        write(tmp_path / name, records)
        (tmp_path / name / "settings.yaml").write_text(YAML.format(name, rate))
    return tmp_path


def test_two_runs_are_compared(runs, capsys):
    main(["report", "a", "b"])
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines()]
    assert ["learning_rate", "0.001", "0.003"] in rows
    assert "out_dir" not in said
    assert "2.9000" in said
    assert "best val_loss_estimate 3.5000 at step 9" in said
    page = (runs / "report-a-b.html").read_text()
    assert page.count("<svg") == 2  # the curves, and no time of one of the runs
    assert "Settings that differ" in page
    assert not (runs / "a" / "report.html").exists()


def test_a_name_with_an_underscore_is_in_the_legend(runs):
    (runs / "a").rename(runs / "_a")
    main(["report", "_a", "b"])
    assert "\u200b_a" in (runs / "report-_a-b.html").read_text()


def test_the_page_is_here_whatever_the_storage(runs, monkeypatch):
    (runs / "here").mkdir()
    monkeypatch.chdir(runs / "here")
    main(["report", "a", "b", f"--storage={runs}"])
    assert (runs / "here" / "report-a-b.html").exists()


def test_mistakes(runs, capfd):
    for words in ("report a none", "report a b a", "report a a", "report a b --html=page"):
        assert exit_status(words.split(" ")) == 2
        assert capfd.readouterr().err.count("\n") == 1
    assert not list(runs.glob("*.html"))
