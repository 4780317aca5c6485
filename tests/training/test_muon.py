"""Muon against its equations and torch's own; whole matrices under FSDP; rates of its groups."""

import pytest
import torch
from torch import nn

from tests.conftest import tiny_settings
from tests.training.worlds import losses, run_world, start_world, weights
from yuzogpt.config import FinetuningSettings, ModelSettings, OptimizerSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initial_weights, initialize
from yuzogpt.runtime.device import Hardware
from yuzogpt.training.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalize
from yuzogpt.training.optimizers import build_optimizer
from yuzogpt.training.parallel import parallelize, shard_like, to_local

SHAPE = ModelSettings(n_layer=2, n_head=2, n_embd=34, block_size=16, vocab_size=50)
WITH_MUON = OptimizerSettings(optimizer="muon", learning_rate=0.02)


def conditioned(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Return a matrix whose singular values lie between 1/30 of the largest and that."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    values = torch.logspace(0, -1.477, min(rows, columns))
    least = min(rows, columns)
    return left[:, :least] * values @ right[:, :least].T


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [(48, 48), (96, 32), (32, 96), (64, 1)])
def test_an_update_is_nearly_orthogonal(size, dtype, apart):
    matrix = conditioned(*size, seed=1)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(7 * matrix[None], dtype)[0]
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.65
    assert values.max() < 1.25
    # The singular vectors stay: in their basis it is diagonal.
    diagonal = left.T @ found @ right.T
    assert (diagonal - diagonal.diag().diag()).abs().max() < apart


def by_hand(weight, gradients, lr, momentum, decay, matrices):
    """Return a weight after steps of Muon, in float64, one matrix at a time."""
    weight, moment = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    a, b, c = COEFFICIENTS
    for gradient in gradients:
        moment = momentum * moment + (1 - momentum) * gradient
        direction = (1 - momentum) * gradient + momentum * moment
        updates = []
        for part in direction.chunk(matrices):
            x = part.T if len(part) > part.shape[1] else part
            x = x / x.norm()
            for _ in range(ITERATIONS):
                gram = x @ x.T
                x = a * x + b * gram @ x + c * gram @ gram @ x
            x = x.T if len(part) > part.shape[1] else x
            updates.append(x * max(1, part.shape[0] / part.shape[1]) ** 0.5)
        weight = weight * (1 - lr * decay) - lr * torch.cat(updates)
    return weight


@pytest.mark.parametrize(
    ("size", "matrices"),
    [((96, 32), 3), ((96, 32), 1), ((64, 32), 2), ((32, 96), 1), ((96, 16), 2)],
)
def test_steps_are_those_of_the_equations(size, matrices):
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(size, generator=generator)
    gradients = [torch.randn(size, generator=generator) for _ in range(4)]
    twins = [nn.Parameter(start.clone()) for _ in range(2)]  # of one shape: taken together
    group = {"params": twins, "weight_decay": 0.1, "matrices": matrices}
    optimizer = Muon([group], lr=0.02, momentum=0.9)
    for gradient in gradients:
        for twin in twins:
            twin.grad = gradient.clone()
        optimizer.step()
    expected = by_hand(start, [g.double() for g in gradients], 0.02, 0.9, 0.1, matrices)
    for twin in twins:
        torch.testing.assert_close(twin.double(), expected, rtol=1e-5, atol=1e-5)


def test_steps_are_torchs_but_for_its_bfloat16():
    start, generator = conditioned(48, 32, seed=3), torch.Generator().manual_seed(4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "weight_decay": 0.1, "matrices": 1}
    optimizers = [
        Muon([group], lr=0.02, momentum=0.95),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1),
    ]
    for _ in range(10):
        gradient = conditioned(48, 32, seed=int(torch.randint(1000, (), generator=generator)))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.5
    assert (ours - theirs).norm() < 0.02 * moved


def test_what_is_no_matrix_of_a_layer_is_adamws():
    model = GPT(SHAPE.model_copy(update={"tie_embeddings": False, "activation": "swiglu"}))
    settings = WITH_MUON.model_copy(
        update={"matrix_lr_mult": 5.0, "embedding_lr_mult": 3.0, "head_lr_mult": 0.5}
    )
    adamw, muon = build_optimizer(model, settings, FinetuningSettings()).parts
    names = {parameter: name for name, parameter in model.named_parameters()}
    of_muon = {
        names[parameter].split(".", 2)[2]: (group["matrices"], group["lr_factor"])
        for group in muon.param_groups
        for parameter in group["params"]
    }
    assert of_muon == {
        "attn.c_attn.weight": (3, 5.0),
        "attn.c_proj.weight": (1, 5.0),
        "mlp.c_fc.weight": (2, 5.0),
        "mlp.c_proj.weight": (1, 5.0),
    }
    rates = {
        names[parameter]: (group["lr_factor"], group["weight_decay"])
        for group in adamw.param_groups
        for parameter in group["params"]
    }
    assert rates["wte.weight"] == rates["wpe.weight"] == (3.0, 0.1)
    assert rates["lm_head.weight"] == (0.5, 0.1)
    assert rates["h.0.ln_1.weight"] == (1.0, 0.0)


class OneStep:
    """Takes one step of Muon on sharded matrices, from gradients that are given."""

    def __init__(self, directory) -> None:
        self.directory = directory

    def __call__(self, rank: int) -> None:
        from yuzogpt.runtime.world import World
        from yuzogpt.training import launch
        from yuzogpt.training.rendezvous import process_group

        def step(settings):
            hardware = Hardware(torch.device("cpu"), None, False, 1, ())
            with process_group(World.of_torchrun(), settings):
                model = parallelize(
                    SHAPE, initial_weights(SHAPE, 1), "fsdp", settings.parallel, hardware
                )
                optimizer = build_optimizer(model.gpt, WITH_MUON, FinetuningSettings())
                ids = torch.zeros(1, 16, dtype=torch.long)
                for seed in (5, 6):
                    model.wrapped(ids, ids).sum().backward()  # so that there are gradients
                    for name, p in model.trainable_parameters().items():
                        to_local(p.grad).copy_(shard_like(given_gradient(name, p.shape, seed), p))
                    optimizer.step()
                    optimizer.zero_grad()
                whole = {n: p.full_tensor() for n, p in model.trainable_parameters().items()}
                if rank == 0:
                    torch.save(whole, self.directory / "after.pt")

        launch.run_as_rank = step


def given_gradient(name: str, size, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + len(name)))


@pytest.mark.slow
def test_a_step_of_shards_is_that_of_one_worker(corpus_dir, tmp_path):
    settings = tiny_settings(corpus_dir, tmp_path, "--parallel=fsdp", "--max_iters=1")
    ranks = start_world(3, settings, OneStep(tmp_path))  # 34 rows on 3 ranks: unequal parts
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    model = GPT(SHAPE)
    initialize(model, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, WITH_MUON, FinetuningSettings())
    for seed in (5, 6):
        for name, parameter in model.named_parameters():
            parameter.grad = given_gradient(name, parameter.shape, seed)
        optimizer.step()
    after = torch.load(tmp_path / "after.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        assert (parameter - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(after[name], parameter.detach(), rtol=0, atol=1e-6)


MUON = ("--optimizer=muon", "--learning_rate=5e-3", "--matrix_lr_mult=4", "--dropout=0.1")


@pytest.mark.slow
def test_training_is_the_same_in_every_way_and_goes_on_exactly(corpus_dir, tmp_path):
    def train(name, size, max_iters, *flags):
        flags = (*MUON, f"--max_iters={max_iters}", *flags)
        run_world(size, tiny_settings(corpus_dir, tmp_path / name, *flags))

    train("one", 1, 30)
    train("fsdp", 2, 30, "--parallel=fsdp")
    train("parts", 2, 12, "--parallel=fsdp")
    train("parts", 2, 30, "--parallel=fsdp")
    one, fsdp = losses(tmp_path / "one"), losses(tmp_path / "fsdp")
    assert one[30] < 0.7 * one[1]
    for step, loss in one.items():
        assert fsdp[step] == pytest.approx(loss, rel=1e-3), step
    assert losses(tmp_path / "parts") == fsdp
    assert weights(tmp_path / "parts", 30) == weights(tmp_path / "fsdp", 30)


def coordinates(width: int, base: int, optimizer: str, rate: float) -> float:
    """Return how much some steps change the logits of a model of this width, on average."""
    shape = ModelSettings(
        n_layer=2, n_head=width // 16, n_embd=width, block_size=16, vocab_size=50,
        mup_base_width=base,
    )  # fmt: skip
    model = GPT(shape)
    initialize(model, 1)
    settings = OptimizerSettings(optimizer=optimizer, learning_rate=rate, weight_decay=0.0)
    steps = build_optimizer(model, settings, FinetuningSettings())
    steps.set_lr(rate)
    ids = torch.randint(0, 50, (8, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids[:, :-1])
    for _ in range(4):
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        steps.step()
        steps.zero_grad()
    with torch.no_grad():
        return (model(ids[:, :-1]) - before).abs().mean().item()


@pytest.mark.slow
def test_mup_keeps_what_a_step_changes_at_every_width():
    """The coordinate check (Yang et al., 2022, appendix D.1)."""
    with_mup = [coordinates(width, 64, "adamw", 0.003) for width in (64, 256, 1024)]
    without = [coordinates(width, 0, "adamw", 0.003) for width in (64, 256, 1024)]
    assert with_mup[0] == without[0]  # at the base's width there is nothing to scale
    assert max(with_mup) < 2 * min(with_mup), with_mup
    assert without[-1] > 3 * without[0], without
    by_muon = [coordinates(width, 64, "muon", 0.003) for width in (64, 192, 512)]
    assert max(by_muon) < 2 * min(by_muon), by_muon
