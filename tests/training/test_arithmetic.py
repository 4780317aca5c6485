"""The arithmetic of a run on CPUs: measured once, part of its state, the same on every rank."""

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import tiny_settings
from tests.training.worlds import exit_codes, records, start_world, train_here, weights
from yuzogpt import runs
from yuzogpt.checkpoints.format import Arithmetic, Checkpoint, State, read_state
from yuzogpt.runtime import fastest
from yuzogpt.runtime.device import choose_hardware
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training.arithmetic import MeasuredPart, by_rule, choose_arithmetic

AUTO = ("--dtype=auto", "--max_iters=6", "--eval_interval=3")
ALONE = World()
EXPLICIT, FUSED = "float32 explicit", "float32 fused"


def script(*durations):
    """A clock by which the candidates take so long, in their order, in every round."""

    def times():
        now = 0.0
        yield now  # the start
        is_first = True
        while True:
            if not is_first:
                yield now  # is the budget spent?
            is_first = False
            for seconds in durations:
                yield now
                now += seconds
                yield now

    return times().__next__


def settings_of(corpus, out_dir, *flags):
    return runs.check(tiny_settings(corpus, out_dir, *AUTO, *flags)).settings


def chosen(settings, clock=None, resume=None):
    hardware = choose_hardware(settings.device, World())
    return choose_arithmetic(settings, World(), hardware, resume, clock or script(0.1))


def remember(settings, name, world=ALONE):
    """Have the cache say what is fastest."""
    part, hardware = MeasuredPart(settings, world), choose_hardware(settings.device, world)
    seconds = dict.fromkeys(part.names, 0.02) | {name: 0.01}
    fastest.remember(fastest.Choice(part.key(hardware), name, seconds))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_fastest_arithmetic_is_chosen_said_and_remembered(corpus_dir, tmp_path, cache):
    settings = settings_of(corpus_dir, tmp_path / "run")
    again = settings_of(corpus_dir, tmp_path / "run", "--autotune=now")
    names = MeasuredPart(settings, World()).names
    for fast in names:
        durations = [0.3 if name == fast else 0.6 for name in names]
        hardware, arithmetic, line = chosen(again, script(*durations))
        assert f"{arithmetic.dtype} {arithmetic.attention}" == fast
        assert (hardware.autocast_dtype or torch.float32) == getattr(torch, arithmetic.dtype)
        expected = f"{arithmetic.dtype}, {arithmetic.attention} attention: 300.0 ms"
        assert line.startswith(f"arithmetic: {expected} forward and backward; ")
        assert chosen(settings)[1:] == (arithmetic, f"{line}, measured before")


@pytest.mark.parametrize("flag", ["--autotune=off", "--dtype=float32", "--dtype=bfloat16"])
def test_nothing_is_measured_where_the_user_has_chosen(corpus_dir, tmp_path, cache, flag):
    settings = settings_of(corpus_dir, tmp_path / "run", flag)
    remember(settings, EXPLICIT)
    before = choose_hardware(settings.device, World())
    hardware, arithmetic, line = chosen(settings)
    assert (hardware, line) == (before, "")
    assert arithmetic == by_rule(settings.model, before.autocast_dtype)


def test_a_large_model_is_measured_in_part_or_not_at_all(corpus_dir, tmp_path, cache):
    flags = ("--n_embd=384", "--n_head=6", "--n_layer=6", "--block_size=256", "--batch_size=64")
    part = MeasuredPart(settings_of(corpus_dir, tmp_path / "run", *flags), World())
    assert part.extent() == ", 1 of 6 layers and 1 of 64 rows"
    large = ("--n_embd=4096", "--n_layer=1", "--block_size=1024")
    assert chosen(settings_of(corpus_dir, tmp_path / "run", *large))[2] == ""


def test_a_run_on_another_machine_says_so_and_follows_the_run(corpus_dir, tmp_path, cache):
    settings = settings_of(corpus_dir, tmp_path / "run")
    remember(settings, FUSED)
    recorded = Arithmetic("float32", "explicit", "Intel 8086")
    resume = Checkpoint(LocalStorage(tmp_path), State(1, 1, {}, "", "", {}, arithmetic=recorded))
    hardware, arithmetic, line = chosen(settings, resume=resume)
    assert (hardware.autocast_dtype, arithmetic) == (None, recorded)
    assert " float32, explicit attention, as this run began on Intel 8086; " in line
    assert fastest.cpu_name() in line
    old = replace(resume, state=replace(resume.state, arithmetic=None))
    assert chosen(settings, resume=old)[2] == ""


@pytest.mark.slow
def test_a_resumed_run_keeps_its_arithmetic_though_the_cache_says_otherwise(
    corpus_dir, tmp_path, cache
):
    settings = {}
    for name in ("whole", "resumed", "other"):
        settings[name] = settings_of(corpus_dir, tmp_path / name)
        remember(settings[name], FUSED if name == "other" else EXPLICIT)
        if name == "resumed":
            train_here(settings_of(corpus_dir, tmp_path / name, "--max_iters=3"))
            remember(settings[name], FUSED)
        train_here(settings[name])
    whole, resumed, other = (weights(tmp_path / name, 6) for name in settings)
    assert resumed == whole != other
    state = read_state(tmp_path / "resumed" / "checkpoints" / "step-6")
    assert (state.arithmetic.dtype, state.arithmetic.attention) == ("float32", "explicit")
    notices = [one["text"] for one in records(tmp_path / "resumed", "notice")]
    said = [text for text in notices if text.startswith("arithmetic: ")]
    assert said[0].startswith("arithmetic: float32, explicit attention: 10.0 ms")
    assert said[1] == "arithmetic: float32, explicit attention, as this run began"


class OwnCache:
    """Gives a rank a cache of its own, and has it write down what it chose."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, rank):
        """Be the fault of a rank."""
        import os

        from yuzogpt.training import loop

        os.environ["XDG_CACHE_HOME"] = str(self.folder / str(rank))
        choose = loop.choose_arithmetic

        def choose_and_write(*arguments):
            found = choose(*arguments)
            (self.folder / f"{rank}.json").write_text(json.dumps(vars(found[1])))
            return found

        loop.choose_arithmetic = choose_and_write


@pytest.mark.slow
def test_all_ranks_follow_the_first(corpus_dir, tmp_path, monkeypatch):
    settings = settings_of(corpus_dir, tmp_path / "run")
    for rank, name in enumerate((EXPLICIT, FUSED)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(rank)))
        remember(settings, name, World(size=2, local_size=2))
    assert exit_codes(start_world(2, settings, OwnCache(tmp_path))) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["attention"] == "explicit"
