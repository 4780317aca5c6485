"""No private name of Ray's is needed: without it a feature is lost, and nothing else."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TINY, yuzogpt
from tests.training.worlds import records
from yuzogpt.orchestration import optional_names, ray_internals

pytestmark = pytest.mark.slow

MODULES = tuple(
    dict.fromkeys(
        f"{name.partition(':')[0]}:"
        for name in ray_internals.NAMES
        if "._" in name.partition(":")[0] or name.startswith(ray_internals.RPC)
        if not name.startswith("ray._raylet:")  # without its core there is no Ray
    )
)


@pytest.mark.parametrize("name", ray_internals.NAMES)
def test_this_ray_has_the_name(name):
    """Else a feature is lost in silence."""
    assert ray_internals.resolve(name) is not ray_internals.MISSING


def test_the_overrides_that_are_listed_are_there():
    for feature in ray_internals.FEATURES.values():
        for name in feature.overrides:
            module, _, attribute = name.partition(":")
            assert hasattr(importlib.import_module(f"yuzogpt.orchestration.{module}"), attribute)


@pytest.fixture(scope="module")
def outcomes():
    """What happens without each name, and without each module."""
    names = ("nothing", *ray_internals.NAMES, *MODULES)
    ended = subprocess.run(
        [sys.executable, "-m", "tests.orchestration.without_names", *names],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(map(json.loads, ended.stdout.splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("taken", ["nothing", *ray_internals.NAMES, *MODULES])
def test_without_a_name_only_its_features_are_lost(outcomes, taken):
    lost = [
        feature
        for feature, (_, _, names, _) in ray_internals.FEATURES.items()
        if any(name == taken or (taken in MODULES and name.startswith(taken)) for name in names)
    ]
    assert outcomes[taken] == sorted(lost)


@pytest.mark.slow
def test_ray_trains_and_prepares_without_any_private_name(text_file, tmp_path):
    without = {optional_names.WITHOUT: "all"}
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    flags = ("--dataset=mine", f"--source={text_file}", "--tokenizer=gpt2", "--num_workers=1")
    prepared = yuzogpt("prepare", *flags, f"--data_dir={corpus}", **without)
    assert prepared.returncode == 0, prepared.stderr
    places = (f"--data_dir={corpus}", f"--out_dir={run}")
    trained = yuzogpt("train", *TINY, *places, "--num_workers=1", "--max_iters=3", **without)
    assert trained.returncode == 0, trained.stderr
    assert records(run, "final")


def test_what_is_missing_is_logged_once(monkeypatch, caplog):
    monkeypatch.setenv(optional_names.WITHOUT, ray_internals.CURRENT_ACTOR)
    ray_internals.report.cache_clear()
    with caplog.at_level("DEBUG", "yuzogpt"):
        assert not ray_internals.has("single_node")
        assert not ray_internals.has("single_node")
        assert ray_internals.has("node_kill")
    (line,) = caplog.messages
    assert line.startswith(f"this Ray has no {ray_internals.CURRENT_ACTOR}: processes of 3 s")
