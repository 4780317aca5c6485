"""FSDP2 against DDP: the same losses, a part of the memory, checkpoints from which both resume."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.conftest import tiny_settings
from tests.training.worlds import (
    exit_codes,
    losses,
    records,
    run_world,
    start_world,
    weights,
)
from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import ModelSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initial_weights, initialize
from yuzogpt.model.shapes import count_weights
from yuzogpt.runtime.device import Hardware
from yuzogpt.training.optimizers import build_optimizer, state_tensors
from yuzogpt.training.parallel import parallelize, shard_rows, to_local

pytestmark = pytest.mark.slow

# An odd batch: the ranks' shares differ, and one rank ends with an empty micro-batch.
FLAGS = ("--dropout=0.1", "--batch_size=1", "--gradient_accumulation_steps=13")
STEPS = 24


@pytest.fixture(scope="module")
def root(corpus_dir, tmp_path_factory):
    """Runs of 24 steps, in worlds and ways of several kinds."""
    root = tmp_path_factory.mktemp("runs")

    def train(name, size, max_iters, *flags):
        steps = f"--max_iters={max_iters}"
        run_world(size, tiny_settings(corpus_dir, root / name, *FLAGS, steps, *flags))

    train("ddp", 2, STEPS)
    train("fsdp", 2, STEPS, "--parallel=fsdp")
    train("parts", 2, 12, "--parallel=fsdp")
    train("parts", 2, STEPS, "--parallel=fsdp", "--activation_checkpointing=True")
    train("mixed", 3, 8, "--parallel=fsdp")
    train("mixed", 1, 16)
    train("mixed", 2, STEPS, "--parallel=fsdp")
    return root


def test_losses_are_ddps(root):
    ddp, fsdp = losses(root / "ddp"), losses(root / "fsdp")
    assert sorted(fsdp) == list(range(1, STEPS + 1))
    assert ddp[STEPS] < 0.9 * ddp[1]
    for step, loss in ddp.items():
        assert fsdp[step] == pytest.approx(loss, rel=1e-5)


def test_resuming_is_exact_and_recomputing_activations_changes_nothing(root):
    assert losses(root / "parts") == losses(root / "fsdp")
    assert weights(root / "parts", STEPS) == weights(root / "fsdp", STEPS)


def test_a_run_goes_on_in_any_world_and_way(root):
    mixed = losses(root / "mixed")
    for step, loss in losses(root / "ddp").items():
        assert mixed[step] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("shape", ["--bias=False", "--bias=True", "--norm=rms"])
def test_fsdp_in_bfloat16_learns_as_ddp_does(corpus_dir, tmp_path, shape):
    """Its weights are rounded where they are gathered; what norms read under autocast is not."""
    flags = (*FLAGS, "--max_iters=6", "--eval_interval=3", "--dtype=bfloat16", shape)
    for kind in ("ddp", "fsdp"):
        run_world(2, tiny_settings(corpus_dir, tmp_path / kind, *flags, f"--parallel={kind}"))
    expected = losses(tmp_path / "ddp")
    for step, loss in losses(tmp_path / "fsdp").items():
        assert loss == pytest.approx(expected[step], abs=1e-2)
    (ddp,), (fsdp,) = (records(tmp_path / kind, "final") for kind in ("ddp", "fsdp"))
    assert fsdp["val_loss"] == pytest.approx(ddp["val_loss"], abs=1e-2)


class Traced:
    """Has dynamo make its graphs, and no kernels of them, which takes a minute."""

    def __call__(self, rank: int) -> None:
        torch.compile = functools.partial(torch.compile, backend="eager")


def test_small_buckets_can_be_compiled(corpus_dir, tmp_path):
    """Dynamo cuts the graph at DDP's buckets, and wants none below the first one's size."""
    flags = ("--max_iters=2", "--compile=True", "--ddp_bucket_mb=0.02", "--n_layer=1")
    settings = tiny_settings(corpus_dir, tmp_path / "run", *flags)
    assert exit_codes(start_world(2, settings, Traced())) == [0, 0]
    assert sorted(losses(tmp_path / "run")) == [1, 2]


class InPieces:
    """Has a rank compute its losses for few tokens at a time, as those of a large vocabulary."""

    def __call__(self, rank: int) -> None:
        from yuzogpt.model import gpt

        gpt.LOGITS_PER_PASS = 200


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_losses_in_pieces_are_those_at_once(root, corpus_dir, tmp_path, parallel):
    flags = (*FLAGS, "--max_iters=12", f"--parallel={parallel}")
    ranks = start_world(2, tiny_settings(corpus_dir, tmp_path, *flags), InPieces())
    assert exit_codes(ranks) == [0, 0]
    at_once = losses(root / "ddp")
    for step, loss in losses(tmp_path).items():
        assert loss == pytest.approx(at_once[step], rel=1e-5)


def test_a_checkpoint_of_several_ranks_is_hugging_faces_layout(root):
    directory = root / "fsdp" / "checkpoints" / f"step-{STEPS}"
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in directory.glob("model-*")) == names
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    model = load_model(resolve_model(str(directory)))
    whole = model.state_dict()
    assert set(index["weight_map"]) == set(whole)
    for name, file in index["weight_map"].items():
        with safe_open(directory / file, "pt") as tensors:
            assert torch.equal(tensors.get_tensor(name), whole[name])
    sizes = [(directory / name).stat().st_size for name in names]
    assert max(sizes) < 1.5 * min(sizes)  # shared out evenly
    one = load_model(
        resolve_model(str(root / "ddp" / "checkpoints" / f"step-{STEPS}"))
    ).state_dict()
    for name, tensor in one.items():
        assert torch.allclose(whole[name], tensor, atol=1e-4)


def test_a_rank_keeps_only_its_part(corpus_dir, tmp_path):
    shape = ModelSettings(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50)
    size = 2
    settings = tiny_settings(corpus_dir, tmp_path, "--parallel=fsdp", "--max_iters=1")
    ranks = start_world(size, settings, Measure(tmp_path))
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    everything = 4 * count_weights(shape)
    for rank in range(size):
        held = json.loads((tmp_path / f"{rank}.json").read_text())
        for what, tensors in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
            share = held[what] / (tensors * everything)
            assert share == pytest.approx(1 / size, rel=0.05), what


class Measure:
    """Writes what a rank holds in bytes, instead of training."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, rank: int) -> None:
        from yuzogpt.runtime.world import World
        from yuzogpt.training import launch
        from yuzogpt.training.rendezvous import process_group

        def measure(settings):
            shape = ModelSettings(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50)
            hardware = Hardware(torch.device("cpu"), None, False, 1, ())
            with process_group(World.of_torchrun(), settings):
                model = parallelize(
                    shape, initial_weights(shape, 1), "fsdp", settings.parallel, hardware
                )
                optimizer = build_optimizer(model.gpt, settings.optimizer, settings.finetuning)
                ids = torch.zeros(1, 16, dtype=torch.long)
                model.wrapped(ids, ids).sum().backward()
                states = state_tensors(model.gpt, optimizer).values()
                held = {
                    "weights": sum(tensor.nbytes for tensor in model.weights()),
                    "gradients": sum(tensor.nbytes for tensor in model.gradients()),
                    "optimizer": sum(to_local(state).nbytes for state in states),
                }
            (self.directory / f"{rank}.json").write_text(json.dumps(held))

        launch.run_as_rank = measure


@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_counted_without_building_the_model(bias):
    shape = ModelSettings(n_layer=3, n_head=2, n_embd=34, block_size=16, vocab_size=50, bias=bias)
    assert count_weights(shape) == sum(p.numel() for p in GPT(shape).parameters())


def test_rows_are_shared_out_as_fsdp_does():
    for rows, size in ((10, 4), (3, 4), (1, 2), (64, 2), (9, 4)):
        whole = torch.arange(rows)
        chunks = [chunk.tolist() for chunk in torch.chunk(whole, size)]
        chunks += [[]] * (size - len(chunks))
        assert [list(shard_rows(rows, rank, size)) for rank in range(size)] == chunks


def test_first_weights_come_one_by_one_as_all_at_once():
    shape = ModelSettings(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50, bias=True)
    model = GPT(shape)
    initialize(model, 7)
    assert all(torch.equal(model.get_parameter(n), v) for n, v in initial_weights(shape, 7))
    assert model.wte.weight[50:].abs().sum() == 0
