"""Settings as keywords are what they are as flags, mistakes too."""

import inspect
import subprocess
import sys

import pytest

import yuzogpt
from tests.conftest import REPOSITORY
from yuzogpt.api.keywords import read_settings
from yuzogpt.config import EvaluateSettings, TrainSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.errors import UserError


def test_keywords_are_flags(tmp_path):
    values = {"max_iters": 7, "overwrite": True, "num_workers": "1..4", "out_dir": tmp_path / "a"}
    flags = ["--max_iters=7", "--overwrite", "--num_workers=1..4", f"--out_dir={tmp_path}/a"]
    preset = "shakespeare_char_cpu"
    assert read_settings(TrainSettings, [preset], values) == resolve(TrainSettings, [preset], flags)
    for tasks in ("lambada, loss", ["lambada", "loss"]):
        settings = read_settings(EvaluateSettings, [], {"tasks": tasks})
        assert settings == resolve(EvaluateSettings, [], ["--tasks=lambada,loss"])


def message(*arguments):
    with pytest.raises(UserError) as caught:
        resolve(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("max_iter", 3), ("max_iters", "three"), ("max_iters", True), ("beta2", 2), ("n_heads", 3)],
)
def test_mistakes_are_those_of_flags(keyword, value):
    flag = f"--{keyword}" if value is True else f"--{keyword}={value}"
    expected = message(TrainSettings, [], [flag])
    with pytest.raises(UserError) as caught:
        yuzogpt.train(**{keyword: value})
    assert str(caught.value) == expected.replace(f"{flag}:", f"{keyword}={value!r}:", 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: yuzogpt.train("shakespear_char"), "did you mean shakespeare_char?"),
        (lambda: yuzogpt.load("nothing-here"), "no model here"),
        (lambda: yuzogpt.load("nothing-here", contxt=3), "did you mean context?"),
        (lambda: yuzogpt.prepare("mine"), "mine"),
        (lambda: yuzogpt.evaluate("eval_gpt2", tasks="lambda"), "did you mean lambada?"),
    ],
)
def test_a_mistake_is_raised_before_anything_starts(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        call()
    assert list(tmp_path.iterdir()) == []


def test_signatures_have_every_setting():
    parameters = inspect.signature(yuzogpt.train).parameters
    assert parameters["max_iters"].default == 600_000
    assert "files" in parameters
    assert "model" in inspect.signature(yuzogpt.load).parameters


def test_the_package_alone_imports_nothing_else():
    code = "import sys, yuzogpt; print([m for m in sys.modules if m.startswith('yuzogpt.')])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert set(yuzogpt.__all__) == set(dir(yuzogpt))
    assert all(getattr(yuzogpt, name) for name in yuzogpt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = yuzogpt.trian
