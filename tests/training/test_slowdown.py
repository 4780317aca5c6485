"""A run that becomes slow says so once, and why."""

import itertools
from dataclasses import replace

import pytest

from yuzogpt.runtime.cores import cores_of_time
from yuzogpt.training.slowdown import SlowdownReport, Usage, read_usage

START = Usage(at=0.0, busy=500.0, own=100.0, stolen=3.0, throttled=1.0, pages=7.0)


def lines(steps, tokens=768, **rates):
    """Return what a report says of steps of so many seconds; `rates`: of its counters, a second."""
    rates = {"own": 1.0, "busy": 1.0, **rates}
    now = itertools.count()

    def read():
        past = 20.0 * next(now)
        counters = {name: getattr(START, name) + rate * past for name, rate in rates.items()}
        return replace(START, at=past, **counters)

    report = SlowdownReport(read)
    return list(filter(None, (report.after_step(seconds, tokens) for seconds in steps)))


FAST, SLOW = [9.0, 0.5, 0.1, *[0.02] * 270], [0.07] * 300  # the first ones warm up


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"busy": 2.2}, "other programs use 1.2 of"),
        ({"busy": 1.9, "throttled": 0.6}, "quota"),
        ({"pages": 400.0, "busy": 1.9}, "400 pages a second"),
        ({"stolen": 0.9 * cores_of_time()}, "the host of this virtual machine"),
        ({"busy": 1.1}, "no other program"),
    ],
)
def test_a_slow_run_says_why(rates, words):
    (line,) = lines(FAST + SLOW, **rates)
    assert line.startswith("!!! steps take 3.5 times as long as when the command started: ")
    assert words in line


def test_it_is_said_once_for_each_time_that_a_run_is_slow():
    assert lines(FAST + [0.02] * 4000) == []
    assert lines(FAST + [0.05] * 4000) == []
    assert lines(FAST + SLOW[:200]) == []  # for 14 seconds only
    assert len(lines(FAST + SLOW * 5)) == 1
    assert len(lines(FAST + SLOW + [0.02] * 2000 + SLOW * 3)) == 2


def test_a_larger_batch_is_not_slower():
    report = SlowdownReport(lambda: START)
    for tokens in (100, 100_000):
        for _ in range(100):
            assert report.after_step(1e-4 * tokens, tokens) == ""


def test_the_counters_of_this_machine():
    before = read_usage()
    if before is None:
        pytest.skip("Linux only")
    sum(range(10**6))
    now = read_usage()
    assert now.at > before.at
    assert now.own >= before.own > 0
    assert now.busy >= before.busy > 0
