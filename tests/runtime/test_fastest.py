"""Measured choices: which wins, what a measurement may take, and what is remembered."""

import os
import stat

import pytest

from yuzogpt.console.terminal import LOGGER
from yuzogpt.runtime import fastest
from yuzogpt.storage.atomic_files import cache_directory

KEY = {"subject": "a test", "threads": 1, "cores": 2.0}


class Machine:
    """A clock, and candidates that move it."""

    def __init__(self, **seconds):
        """`seconds`: what each call of a candidate takes, in turn; the last one from then on."""
        self.now, self.calls = 100.0, dict.fromkeys(seconds, 0)
        self.candidates = {
            name: lambda name=name, taken=taken: self.work(name, taken)
            for name, taken in seconds.items()
        }

    def work(self, name, taken):
        self.now += taken[min(self.calls[name], len(taken) - 1)]
        self.calls[name] += 1

    def choose(self, default):
        return fastest.measure(KEY, self.candidates, default, lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"a": [0.02], "b": [0.01], "c": [0.03]}, "b"),
        ({"a": [0.0101], "b": [0.01]}, "a"),  # within the margin
        ({"a": [0.01], "b": [0.5, 0.005]}, "b"),  # the first call warms up
        ({"a": [0.01, 0.01, 0.1], "b": [0.01, 0.02, 0.05]}, "b"),  # a busy machine slows both
        ({"a": [0.02], "b": [0.01, 0.01, 0.03] * 9}, "a"),  # the rounds do not agree
        ({"a": [0.4], "b": [0.3]}, "a"),  # too few rounds for that
        ({"a": [0.4], "b": [0.2]}, "b"),
    ],
)
def test_the_fastest_is_chosen_and_the_default_kept_if_it_is_as_fast(seconds, chosen):
    choice = Machine(**seconds).choose("a")
    assert choice.name == chosen
    assert choice.seconds.keys() == seconds.keys()


@pytest.mark.parametrize("each", [1e-4, 0.05, 0.4, 5.0])
def test_a_measurement_keeps_its_budget(each):
    machine = Machine(a=[each], b=[each / 2])
    assert machine.choose("a").name == "b"
    assert machine.now - 100 < max(fastest.BUDGET_S, 1.5 * each) + 1.5 * each
    assert machine.calls["a"] == machine.calls["b"] <= fastest.MAX_ROUNDS + 1


def remembered(**changes):
    return fastest.remembered({**KEY, **changes}, ["a", "b"])


@pytest.fixture
def choice(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice = fastest.Choice(KEY, "b", {"a": 0.02, "b": 0.01})
    fastest.remember(choice)
    return choice


def test_a_disturbed_measurement_is_made_again_later(choice):
    fastest.remember(fastest.Choice(KEY, "a", {"a": 0.02, "b": 0.01}, is_steady=False))
    assert remembered().name == "a"
    (file,) = (cache_directory() / fastest.FOLDER).iterdir()
    earlier = file.stat().st_mtime - fastest.UNSTEADY_MAX_AGE_S
    os.utime(file, (earlier, earlier))
    assert remembered() is None


def test_a_choice_is_remembered_for_its_key_and_this_user_alone(choice):
    assert remembered() == choice
    assert remembered(threads=2) is None
    assert fastest.remembered(KEY, ["a", "c"]) is None
    (file,) = (cache_directory() / fastest.FOLDER).iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"key": {}, "name": "b", "seconds": {"a": 1.0, "b": 2.0}}', "x" * 2**17],
)
def test_a_damaged_or_foreign_file_is_no_choice(choice, content, caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", True)
    (file,) = (cache_directory() / fastest.FOLDER).iterdir()
    file.write_text(content)
    with caplog.at_level("DEBUG", LOGGER.name):
        assert remembered() is None
    assert {record.levelname for record in caplog.records} == {"DEBUG"}
    fastest.remember(choice)
    assert remembered() == choice


def test_without_a_cache_nothing_is_remembered(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fastest.remember(fastest.Choice(KEY, "b", {"a": 0.02, "b": 0.01}))
    assert remembered() is None


def test_the_cpu_has_a_name_on_every_system(tmp_path):
    assert fastest.cpu_name(tmp_path)
    (tmp_path / "proc").mkdir()
    lines = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R)\n"
    (tmp_path / "proc" / "cpuinfo").write_text(lines)
    assert fastest.cpu_name(tmp_path) == "Intel(R) Xeon(R) (6/143)"
