"""Private names of torch: each is there today, and whatever uses it works where it is missing."""

import json
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist

from tests.conftest import TINY
from tests.training.worlds import losses
from yuzogpt.runtime import torch_internals
from yuzogpt.runtime.watchdog import Watchdog
from yuzogpt.runtime.world import World

# A command whose torch has none of the names.
WITHOUT = """if True:
    import sys
    import types

    import torch
    import torch._dynamo  # looks some of them up while it is imported
    import torch.distributed as dist

    torch.ops.mkldnn = types.SimpleNamespace()
    del torch._foreach_norm, torch._foreach_mul_, torch._foreach_sub
    del dist.distributed_c10d._get_default_store

    from yuzogpt import cli

    cli.run(sys.argv[1:])
"""


def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size in ((3, 5), (7,), (64, 64))]


def test_torch_has_all_of_them():
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    assert callable(dist.distributed_c10d._get_default_store)
    for name in ("_foreach_norm", "_foreach_mul_", "_foreach_sub"):
        assert callable(getattr(torch, name))


def computed(name):
    given, others = tensors(), tensors()
    if name == "_foreach_norm":
        return torch_internals.vector_norms(given)
    if name == "_foreach_sub":
        return torch_internals.subtract([2 * tensor for tensor in given], others)
    torch_internals.multiply_(given, 0.3)
    return given


@pytest.mark.parametrize("name", ["_foreach_norm", "_foreach_mul_", "_foreach_sub"])
def test_a_call_per_tensor_gives_the_same_bits(monkeypatch, name):
    expected = computed(name)
    monkeypatch.delattr(torch, name)
    for value, reference in zip(computed(name), expected, strict=True):
        assert torch.equal(value, reference)


def test_an_unknown_cpu_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    assert not torch_internals.cpu_has_bfloat16()


def test_without_a_store_each_rank_watches_itself(monkeypatch):
    monkeypatch.delattr(dist.distributed_c10d, "_get_default_store")
    with Watchdog(World(rank=1, size=3), 100, lambda _: None) as watchdog:
        watchdog.heartbeat("step 7")
        stalled = watchdog.find_stalled_ranks(watchdog.peers)
    assert list(stalled) == [1]
    assert "made no progress for 0 s (in step 7)" in stalled[1]


@pytest.mark.slow
def test_a_run_without_any_of_them_computes_the_same(corpus_dir, tmp_path):
    for name, head in (("with", ["-m", "yuzogpt"]), ("without", ["-c", WITHOUT])):
        places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / name}"]
        flags = [*TINY, *places, "--num_workers=0", "--max_iters=4", "--health_interval=2"]
        subprocess.run([sys.executable, *head, "train", *flags], check=True, capture_output=True)
    assert losses(tmp_path / "without") == losses(tmp_path / "with")
    health = [
        [record["layers"] for line in lines if (record := json.loads(line))["kind"] == "health"]
        for lines in (
            (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            for name in ("with", "without")
        )
    ]
    assert len(health[0]) == 2
    assert health[0] == health[1]
