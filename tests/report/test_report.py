"""`yuzogpt report`: known records in, known numbers out; a page that is one file."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY, tiny_settings
from yuzogpt import runs
from yuzogpt.cli import main
from yuzogpt.errors import UserError
from yuzogpt.report import loss_curve, tables, terminal
from yuzogpt.report.history import History
from yuzogpt.report.plots import binned, plots
from yuzogpt.report.summary import summarize
from yuzogpt.runs.event_log import read_records
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training.launch import work

TOKENS = 1000  # of a step
DEATH = "!!! worker 1 failed (<b>&</b> [red]OOM[/red]\x1b[2J\n); see errors.log"


def start(time, step, redone=0):
    return {
        "kind": "start", "step": step, "time": time, "workers": 2, "parallel": "ddp",
        "redone_steps": redone, "tokens_per_step": TOKENS,
    }  # fmt: skip


def train(time, step, loss=2.5, grad_norm=1.0, **values):
    return {
        "kind": "train", "step": step, "time": time, "rows_seen": 4 * step, "loss": loss,
        "lr": 1e-3, "grad_norm": grad_norm, "tokens_per_second": TOKENS / 2,
        "tokens_per_step": TOKENS, "clip_rate": 0.25, "skipped": 0, **values,
    }  # fmt: skip


def steps(begin, first, last):
    """Return train records, two seconds a step; the first ends at `begin`."""
    return [train(begin + 2 * i, step) for i, step in enumerate(range(first, last + 1))]


def other(kind, time, step=0, **values):
    return {"kind": kind, "step": step, "time": time, **values}


def layers(update=1e-3):
    numbers = {"grad_norm": 0.5, "weight_norm": 10.0, "update_to_weight": update}
    return dict.fromkeys(("wte", "h.0", "h.1", "ln_f"), numbers)


# 12 s to the end of step 1, whose own are 2; a worker dies after step 25 and the run continues from
# 20; a stop at step 30; 10 more steps.
RESTARTED = [
    other("notice", 999, text="model: 1.00M parameters"),
    start(1000, 0),
    other("evaluation", 1009, 0, rows_seen=0, val_loss_estimate=4.0),
    *steps(1012, 1, 20),  # step 20 at 1050
    other("evaluation", 1055, 20, rows_seen=80, val_loss_estimate=3.0),
    other("checkpoint", 1056, 20, stall_seconds=1.0, write_seconds=5.0, bytes=2000),
    other("failure", 1070, text=DEATH, rank=1),
    start(1090, 20, redone=5),
    *steps(1152, 21, 30),  # step 21 at 1152: 102 s later, 100 of them lost; step 30 at 1170
    other("checkpoint", 1171, 30, stall_seconds=3.0, write_seconds=7.0, bytes=4000),
    other("stop", 1172, 30, text="stopping", reason="SIGTERM"),
    start(1300, 30),
    *steps(1322, 31, 40),  # 152 s later, 150 of them lost; step 40 at 1340
    other("evaluation", 1345, 40, rows_seen=160, val_loss_estimate=3.1),
    other("health", 1346, 40, layers=layers()),
    other("final", 1350, 40, val_loss=2.9, best_step=30, best_val_loss=2.8),
]


def write(run, records, tail=""):
    run.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(lines + tail)
    return run


def summary_of(run, records):
    history = History.read(write(run, records) / "metrics.jsonl")
    return summarize(run, history)


def report(run, capsys, *flags):
    main(["report", str(run), *flags])
    return capsys.readouterr().out


def test_restarts_and_effective_training_time(tmp_path):
    found = summary_of(tmp_path, RESTARTED)
    assert found.wall == 350
    assert found.lost_by_cause == {"start-up": 10, "worker failed": 95, "SIGTERM": 150}
    assert found.productive == 95
    assert found.effective == pytest.approx(95 / 350)
    assert [
        (r.started, r.step, r.cause, r.redone_steps, r.redone_tokens, r.lost_seconds)
        for r in found.restarts
    ] == [(1090, 20, "worker failed", 5, 5000, 95), (1300, 30, "SIGTERM", 0, 0, 150)]
    assert (found.step, found.tokens, found.state) == (40, 40_000, "finished")
    assert (found.workers, found.parallel, found.model) == (2, "ddp", "1.00M parameters")
    assert found.tokens_per_second == 500
    assert found.clip_rate == 0.25
    assert found.final == {"val_loss": 2.9, "best_step": 30, "best_val_loss": 2.8}
    assert found.evaluation_seconds == 10  # the first one is in the start-up
    assert found.best_estimate == (20, 3.0)
    checkpoints = found.checkpoints
    assert (checkpoints.count, checkpoints.median_stall, checkpoints.longest_stall) == (2, 2, 3)
    assert (checkpoints.median_write, checkpoints.median_bytes) == (6, 3000)


@pytest.mark.parametrize(("begun", "start_up"), [(995, 15), (1005, 10), (1000 - 10**6, 10)])
def test_wall_time_begins_with_the_command_unless_its_clock_is_another(tmp_path, begun, start_up):
    first = {**start(1000, 0), "begun": begun}
    found = summary_of(tmp_path, [RESTARTED[0], first, *RESTARTED[2:]])
    assert found.wall == 340 + start_up
    assert found.lost_by_cause["start-up"] == start_up
    assert found.productive == 95


def test_a_run_that_gave_up_says_so(tmp_path):
    gave_up = other("failure", 1012, text="no disk", reason="gave up")
    records = [start(1000, 0), *steps(1002, 1, 5), gave_up, start(1100, 5), *steps(1102, 6, 7)]
    (restart,) = summary_of(tmp_path, records).restarts
    assert (restart.cause, tables.cause(restart)) == ("gave up", "no disk")


def test_a_clock_that_is_set_back_makes_no_time_negative(tmp_path):
    """By 1,000 s between two attempts; and another machine's clock is 2 s behind."""
    records = [start(1000, 0), *steps(1012, 1, 20)]  # step 20 at 1050
    records += [other("failure", 1048, text=DEATH, rank=1)]
    records += [start(90, 20), *steps(92, 21, 40)]
    found = summary_of(tmp_path, records)
    assert found.wall == 50 + 40  # what lies between the attempts is not known
    assert all(seconds >= 0 for seconds in found.lost_by_cause.values())
    assert sum(found.lost_by_cause.values()) == pytest.approx(10)  # its start-up
    assert found.productive == pytest.approx(80)


def test_redone_tokens_are_those_that_were_counted(tmp_path):
    counted = {**start(1100, 5, redone=5), "redone_tokens": 1200}  # in a batch that grew
    records = [start(1000, 0), *steps(1002, 1, 10), counted, *steps(1102, 6, 10)]
    (restart,) = summary_of(tmp_path, records).restarts
    assert (restart.redone_steps, restart.redone_tokens) == (5, 1200)


def test_an_evaluation_later_on_is_no_time_of_the_run(tmp_path):
    killed = [start(1000, 0), *steps(1002, 1, 10)]  # until 1020
    evaluated = [other("notice", 9000, 5, text="model: 1M"), other("eval_only", 9060, 5)]
    assert summary_of(tmp_path, [*killed, *evaluated]).wall == 20


def test_an_attempt_that_trained_nothing_is_not_counted_twice(tmp_path):
    records = [
        start(0 + 1000, 0),
        *steps(1002, 1, 10),  # step 10 at 1020
        other("failure", 1025, text="!!! worker 0 failed (a)", rank=0),
        start(1030, 10, redone=3),
        other("failure", 1040, text="!!! worker 0 failed (b)", rank=0),
        start(1060, 10),
        *steps(1072, 11, 20),
    ]
    found = summary_of(tmp_path, records)
    assert [attempt.lost_seconds for attempt in found.attempts] == [0, 20, 30]
    assert [len(attempt.causes) for attempt in found.attempts] == [0, 1, 1]
    assert found.productive == found.wall - 50 == 40
    # Killed before it trained again: all time since the last step is lost.
    killed = summary_of(tmp_path, records[:-10])
    assert [attempt.lost_seconds for attempt in killed.attempts] == [0, 20, 20]
    assert killed.state == "not finished"


def test_log_interval_and_a_checkpoint_between_two_records(tmp_path):
    records = [
        start(1000, 0),
        *(train(1000 + 2 * step, step) for step in (10, 20, 30)),
        start(1100, 35, redone=2),  # steps 31 to 35 were kept, unlogged
        *(train(1100 + 2 * (step - 35), step) for step in (40, 50)),
    ]
    found = summary_of(tmp_path, records)
    assert found.lost_by_cause == {
        "start-up": 0,
        "started again": 30,
    }  # 1060 to 1110, less 10 steps
    assert found.tokens == 50_000


def test_old_files(tmp_path):
    old = {"clip_rate", "skipped"}
    records = [
        other("notice", 1000, text="weights: scratch"),
        *({k: v for k, v in r.items() if k not in old} for r in steps(1002, 1, 10)),
        other("notice", 1030, text=DEATH),
        other("notice", 1060, 10, text="resuming at step 10"),
        *steps(1072, 11, 20),
        other("final", 1091, 20, val_loss=2.9, best_step=20, best_val_loss=2.9),
        # Evaluated much later: no part of the run's time, and no restart.
        other("notice", 9000, 20, text="resuming at step 20"),
        other("eval_only", 9001, 20, val_loss=2.9),
    ]
    found = summary_of(tmp_path, records)
    assert (found.wall, found.state) == (91, "finished")
    assert found.lost_by_cause == {"start-up": 0, "worker failed": 50}
    assert found.restarts[0].redone_steps is None
    assert tables.cause(found.restarts[0]).startswith("worker 1 failed (<b>&</b> [red]OOM[/red]")


@pytest.mark.parametrize(
    ("end", "state"),
    [
        ([], "not finished"),
        ([other("stop", 1100, 5, reason="preemption"), other("checkpoint", 1101, 5)], "stopped"),
        ([other("stop", 1100, 5, reason="preemption"), start(1200, 5)], "not finished"),
        (
            [other("failure", 1100, text="step 5 is the 4th", reason="gave up")],
            "gave up: step 5 is",
        ),
        ([other("failure", 1100, text=DEATH)], "not finished"),
        ([other("final", 1100, 5, val_loss=2.0), other("notice", 1101, text="x")], "finished"),
        ([other("final", 1100, 5, val_loss=2.0), *steps(1200, 6, 7)], "not finished"),
    ],
)
def test_state(end, state, tmp_path):
    found = summary_of(tmp_path, [start(1000, 0), *steps(1002, 1, 5), *end])
    assert found.state.startswith(state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "records",
    [
        [other("notice", 1000, text="model: small")],
        [start(1000, 0)],
        [start(1000, 0), train(1002, 1)],
        [start(1000, 0), train(1002, 1, loss=None, grad_norm=None, skipped=1)],
        [train(1002, 1, loss=float("nan")), train(1004, 2, loss=float("inf"))],
        [other("evaluation", 1000, 0, val_loss_estimate=3.0)],
        [other("health", 1000, 10, layers={"wte": {"grad_norm": 0.0}}), train(1001, 10)],
        [other("health", 1000, 10, layers=None), other("checkpoint", 1001, 1), {"kind": "x"}],
        [start(1000, 0), train(1002, 1), other("final", 1003, 1, val_loss=None)],
    ],
)
def test_little_is_enough(records, tmp_path, capsys):
    records = [{"step": 0, **record} for record in records]
    write(tmp_path, records, tail='{"kind": "train", "st')
    assert "page: " in report(tmp_path, capsys)


def test_skipped_steps_and_spikes_are_marked(tmp_path, capsys):
    records = [start(1000, 0), *steps(1002, 1, 10)]
    records[5] = train(1010, 5, loss=None, grad_norm=None, skipped=1)
    records.insert(5, other("skip", 1010, 5, text="gradient norm is inf", reason="gradient"))
    records.append(other("spike", 1021, 10, text="loss 9, expected 2", loss=9.0, expected=2.0))
    text = report(write(tmp_path, records), capsys)
    assert "gradient norm is inf" in text
    page = (tmp_path / "report.html").read_text()
    assert "skipped: 1" in page
    assert "spike: 1" in page


def test_the_page_is_one_file_and_escapes(tmp_path, capsys):
    run = write(tmp_path / "a<i>&run", RESTARTED)
    text = report(run, capsys)
    page = (run / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 8  # seven plots and a bar
    assert page.index("<dt>val loss, whole split</dt>") == page.index("<dt>")
    assert 'aria-label="Learning rate. ' in page
    assert "val_loss_estimate: from 4 to 3.1, lowest 3;" in page
    outside_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    for banned in ("http://", "https://", "<script", "@import", "url(//", "<b>", "<i>"):
        assert banned not in outside_namespaces
    assert "&lt;b&gt;&amp;&lt;/b&gt; [red]OOM[/red]" in page
    assert "<h1>a&lt;i&gt;&amp;run</h1>" in page
    assert "\x1b" not in page + text
    assert "[red]" in text  # no markup to rich
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))


def test_a_heading_in_brackets_is_no_markup(tmp_path, capsys):
    run = write(tmp_path / "run", RESTARTED)
    scores = {"kind": "tasks", "step": 10, "time": 1, "mine [red] accuracy": 0.5}
    (run / "evaluations.jsonl").write_text(json.dumps(scores) + "\n")
    assert "[red]" in report(run, capsys)


def test_no_line_is_wider_than_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = summary_of(tmp_path, RESTARTED)
    terminal.show("run", tables.facts(found), tables.tables(found))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_downsampling_keeps_a_spike_of_one_step(tmp_path):
    values = np.ones(100_000)
    values[54_321], values[7] = 50.0, np.nan
    found = binned(np.arange(1.0, 100_001), values)
    assert len(found.step) == 1000
    assert found.high.max() == 50
    assert abs(found.step[found.high.argmax()] - 54_322) <= 100
    assert (found.low == 1).all()
    records = [train(1000 + step, step, loss=1.0) for step in range(1, 5001)]
    records[2500]["loss"] = 5.0
    history = History.from_records(records)
    loss, *others = plots(history, summarize(tmp_path, history))
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", loss.svg)]
    spiked, before = min(heights), sorted(heights)[len(heights) // 2]
    assert before - spiked > 100  # points: across the plot
    assert sum(len(plot.svg) for plot in (loss, *others)) < 1_000_000


@pytest.mark.slow
def test_a_run_as_it_is(corpus_dir, tmp_path, capsys):
    flags = ["--max_iters=20", "--eval_interval=10"]
    settings = runs.check(tiny_settings(corpus_dir, tmp_path / "run", *flags)).settings
    with runs.hold_run_dir(settings):
        work(settings, World(), lambda *_: None, None, StopRequest())
    text = report(tmp_path / "run", capsys, f"--html={tmp_path / 'elsewhere.html'}")
    assert "20 of 20" in text
    assert "finished" in text
    page = (tmp_path / "elsewhere.html").read_text()
    assert page.count("<pre>") == 2
    assert re.search(r">n_layer</td>\s*<td[^>]*>2</td>\s*<td[^>]*>12</td>", page)
    assert ">out_dir</td>" not in page
    assert not (tmp_path / "run" / "report.html").exists()
    records = read_records(tmp_path / "run" / runs.METRICS)
    loss_curve.draw(records, tmp_path / "run" / runs.CURVE)
    assert (tmp_path / "run" / runs.CURVE).read_bytes().startswith(b"\x89PNG")
    report(tmp_path / "run", capsys)
    runs.clear(LocalStorage(tmp_path / "run"))
    assert not (tmp_path / "run" / runs.REPORT).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--out_dir=: empty"),
        ("{run} {run} {run}", "two runs at a time"),
        ("{tmp}/none", "no run here (no metrics.jsonl)"),
        ("{tmp}", "no run here (no metrics.jsonl)"),
        ("{tmp}/empty", "no run here (no metrics.jsonl with a whole record in it)"),
        ("hf://bucket/run", "hf:// is not supported"),
        ("{run} --html={tmp}/none/r.html", "is not a directory"),
        ("{run} --html={run}/metrics.jsonl", "let it end in .html"),
        ("{run} --htm=x.html", "did you mean html?"),
        ("{run} --html={tmp}/mine.html", "not a page of `yuzogpt report`"),
        ("{mine}", "report.html: not a page of `yuzogpt report`"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    write(tmp_path / "empty", [], tail='{"kind": "tr')
    run, mine = (write(tmp_path / name, RESTARTED) for name in ("run", "mine"))
    for page in (tmp_path / "mine.html", mine / "report.html"):
        page.write_text("<!DOCTYPE html>\n<title>Mine</title>\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        main(["report", *arguments.format(tmp=tmp_path, run=run, mine=mine).split()])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_it_needs_neither_torch_nor_ray(tmp_path):
    run = write(tmp_path, RESTARTED)
    code = (
        "import sys; from yuzogpt.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "report", str(run)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"),
        (3600, "1 h 00 min"), (86_399, "1 d 00 h"), (200_000, "2 d 08 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


def test_large_numbers():
    found = [tables.rounded(10.0**power) for power in range(0, 17, 4)]
    assert found == ["1", "10k", "100M", "1T", "1e+04T"]
    assert tables.size(1_493_000_000) == "1.49 GB"
