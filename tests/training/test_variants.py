"""Parts that GPT-2 has not, as they are trained: in each world as in one process, and compiled."""

import pytest
import torch

from tests.conftest import tiny_settings
from tests.training.worlds import losses, run_world
from yuzogpt.config import ModelSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize

# Each part in one of two models.
MODELS = {
    "rotary": {
        "pos_emb": "rotary", "activation": "swiglu", "norm": "rms", "qk_norm": True,
        "mup_base_width": 16,
    },
    "alibi": {
        "pos_emb": "alibi", "activation": "relu2", "tie_embeddings": False, "logit_softcap": 2.0,
    },
}  # fmt: skip
STEPS = 8


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_part_learns_the_same_in_any_world(corpus_dir, tmp_path, name):
    flags = [f"--{key}={value}" for key, value in MODELS[name].items()]
    flags += [f"--max_iters={STEPS}", "--optimizer=muon"]
    for world, size in (("none", 1), ("ddp", 2), ("fsdp", 2)):
        way = [] if world == "none" else [f"--parallel={world}"]
        run_world(size, tiny_settings(corpus_dir, tmp_path / world, *flags, *way))
    alone = losses(tmp_path / "none")
    assert alone[STEPS] < 0.95 * alone[1]
    for world in ("ddp", "fsdp"):
        found = losses(tmp_path / world)
        assert found == pytest.approx(alone, rel=1e-4), world


@pytest.mark.slow
def test_they_can_be_compiled():
    """As one graph each; the kernels that inductor makes of it take a minute to compile."""
    parts = {**MODELS["rotary"], "tie_embeddings": False, "logit_softcap": 2.0}
    model = GPT(
        ModelSettings(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=50, **parts)
    )
    initialize(model, 1)
    ids = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(1))
    found = []
    for trained in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        losses_of_tokens = trained(ids[:, :-1], ids[:, 1:])
        losses_of_tokens.sum().backward()
        found.append((losses_of_tokens.detach(), [p.grad for p in model.parameters()]))
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
