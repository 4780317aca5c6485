"""`yuzogpt report` on records that nobody of ours wrote: a report, or one line."""

import json
import math
import os
import random
import warnings

import pytest

from tests.report.test_report import RESTARTED, layers, other, start, steps, train, write
from yuzogpt.cli import exit_status
from yuzogpt.report import page, tables
from yuzogpt.report import settings as settings_table
from yuzogpt.report.history import History
from yuzogpt.report.plots import plots
from yuzogpt.report.summary import summarize

EVERY_KIND = [
    *RESTARTED,
    other("network", 1351, 40, slowest_mbit_per_second=90.0, slowest_hop="rank 0 to 1"),
    other("skip", 1352, 40, text="skipped"),
    other("spike", 1353, 40, text="spiked"),
    other("undone", 1354, 40, steps=3, rows=12),
    other("failure", 1355, 40, text="no disk", reason="gave up"),
    other("health", 1356, 41, layers=layers(2e-3)),
    start(1360, 40, redone=2),
    *steps(1362, 41, 44),
    other("stop", 1372, 44, text="stopping", reason="SIGTERM"),
]
MISSING = object()
VALUES = [
    MISSING, None, True, "x", "\x1b]52;c;aGk=\x07", [], [1], {}, {"a": {"b": []}}, {"h.0": 3},
    -1, 0, 0.5, math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, 2**53, 2**63, 253402300799,
    1e-300,
]  # fmt: skip


def changed(record, field, value):
    """Return a record with another value in a field, or without it."""
    kept = {name: old for name, old in record.items() if name != field or value is not MISSING}
    return kept if value is MISSING else {**kept, field: value}


def fields_of_each_kind():
    """Yield (index, field) once for each field of each kind."""
    known = set()
    for index, record in enumerate(EVERY_KIND):
        for field in record:
            if (record["kind"], field) not in known:
                known.add((record["kind"], field))
                yield index, field


def shown(run, records):
    """Return all that a report says of records, without drawing."""
    history = History.from_records(records)
    if history is None:
        return ""
    summary = summarize(run, history)
    return page.page(summary, tables.facts(summary), tables.tables(summary), [])


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:12])
def test_any_field_of_any_record_may_hold_anything(value, tmp_path):
    for index, field in fields_of_each_kind():
        records = list(EVERY_KIND)
        records[index] = changed(records[index], field, value)
        assert "\x1b" not in shown(tmp_path, records)
        assert "\x1b" not in shown(tmp_path, [records[index]])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_files_in_which_much_is_wrong_are_drawn(seed, tmp_path):
    generator = random.Random(seed)
    records = [*EVERY_KIND, *EVERY_KIND[:3]]
    for index, record in enumerate(records):
        for field in record:
            if generator.random() < 0.15:
                record = changed(record, field, generator.choice(VALUES))
        records[index] = record
    generator.shuffle(records)
    history = History.read(write(tmp_path, records) / "metrics.jsonl")
    summary = summarize(tmp_path, history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's, of axes without room
        drawn = list(plots(history, summary))
    assert drawn
    assert "\x1b" not in page.page(summary, tables.facts(summary), tables.tables(summary), drawn)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:12])
def test_benchmarks_may_hold_anything(value, tmp_path):
    sound = {"kind": "tasks", "step": 10, "time": 1000.0, "text": "a", "lambada accuracy": 0.5}
    for field in sound:
        (table,) = tables.benchmarks([{**sound, "step": 20}, changed(sound, field, value)])[:1]
        assert len({len(row) for row in table.rows} | {len(table.columns)}) == 1
        assert "\x1b" not in str(table)
    many = {f"{name}\x1b": 1.0 for name in range(1000)}
    (table,) = tables.benchmarks([{**sound, **many}])
    assert len(table.columns) <= 51
    assert not any("\x1b" in name for name in table.columns)


def test_a_sample_is_escaped(tmp_path):
    found = summarize(tmp_path, History.from_records(RESTARTED))
    drawn = page.page(found, [], [], [], ["</pre><script>{{ 1 }}\x1b[2J"])
    assert r"<pre>&lt;/pre&gt;&lt;script&gt;{{ 1 }}\x1b[2J</pre>" in drawn


def test_a_health_record_of_endless_layers_takes_no_memory():
    records = [
        other("health", 1000 + n, n, layers={f"{n}.{k}": {"grad_norm": 1.0} for k in range(100)})
        for n in range(100)
    ]
    assert len(History.from_records(records).health.layers) == 1000


@pytest.mark.slow
def test_settings_may_hold_anything(tmp_path):
    write(tmp_path, EVERY_KIND)
    settings = tmp_path / "settings.yaml"
    bomb = "a: &a [x, x]\n" + "".join(
        f"{new}: &{new} [*{old}, *{old}, *{old}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for content in (
        "[" * 2000, "a: 2026-99-99", "optimizer: {learning_rate: [1], beta1: x\x1b}",
        "data: 7\nschedule: []", "data: {dataset: [1, 2]}", "\x00",
        "schedule: {max_iters: 1e400}", bomb + "data: {dataset: *i}\n", "? [a, b]\n: c",
        "a: !!python/x 3",
    ):  # fmt: skip
        settings.write_text(content)
        summary = summarize(tmp_path, History.from_records(EVERY_KIND))
        said = tables.facts(summary)
        assert len(str(said)) < 2000, content
        assert len(str(settings_table.table(summary.settings))) < 2000, content
    settings.unlink()
    os.mkfifo(settings)
    assert exit_status(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize("back", [1, 3600, 10**8])
def test_a_clock_that_is_set_back_costs_no_time(back, tmp_path):
    """Half of the run is on a clock that is behind by so much."""
    records = [start(10**9, 0), *steps(10**9 + 2, 1, 50)]
    moved = steps(10**9 + 102 - back, 51, 100)
    history = History.from_records(
        [*records, *moved, other("final", moved[-1]["time"] + 1, 100, val_loss=2.0)]
    )
    summary = summarize(tmp_path, history)
    assert summary.wall == pytest.approx(201, abs=3)
    assert summary.effective == pytest.approx(1, abs=0.02)
    assert summary.state == "finished"


def test_numbers_that_json_alone_has_are_no_numbers(tmp_path):
    lines = [json.dumps(train(1000 + n, n + 1)) for n in range(3)]
    lines.insert(1, json.dumps(train(1001, 9)).replace("2.5", "9" * 500))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    history = History.read(tmp_path / "metrics.jsonl")
    assert math.isnan(history.train["loss"][1])
    assert summarize(tmp_path, history).step == 3
