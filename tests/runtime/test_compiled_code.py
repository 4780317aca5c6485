"""Compiled code is kept where only its user can write: torch runs what it finds there."""

import os
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from yuzogpt.config import ModelSettings, ParallelSettings
from yuzogpt.runtime import device
from yuzogpt.runtime.device import Hardware
from yuzogpt.training.parallel import parallelize


@pytest.fixture(autouse=True)
def no_folder_is_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # to be as it was at the end
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def train_compiled() -> Path:
    """Make a model that is to be compiled; return where torch will keep the code."""
    shape = ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=5)
    compiled = Hardware(torch.device("cpu"), None, compile=True, threads=1, reasons=())
    parallelize(shape, iter([]), "none", ParallelSettings(), compiled)
    return Path(cache_dir())


def test_a_model_is_compiled_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("yuzogpt.training.parallel.ParallelModel.load", lambda *_: None)
    found = train_compiled()
    assert found.is_relative_to(tmp_path / "cache")
    assert found.stat().st_mode & 0o777 == 0o700


def test_without_a_cache_it_is_a_folder_of_its_own(monkeypatch):
    def refuse() -> Path:
        raise PermissionError

    monkeypatch.setattr(device, "cache_directory", refuse)
    device.keep_compiled_code_private()
    found = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert found.stat().st_mode & 0o777 == 0o700
    assert found.stat().st_uid == os.getuid()


def test_a_folder_that_the_user_chose_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    device.keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
