"""Positions and parts that GPT-2 has not, against other implementations of the same equations."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXConfig,
    GPTNeoXRotaryEmbedding,
    apply_rotary_pos_emb,
)

from yuzogpt.config import InitializationSettings, ModelSettings
from yuzogpt.model.attention import Attention
from yuzogpt.model.dropout import row_keys
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initial_weights, initialize
from yuzogpt.model.layers import ACTIVATIONS, NORMS
from yuzogpt.model.positions import (
    POSITION_KINDS,
    AlibiPositions,
    AttentionContext,
    RotaryPositions,
    causal_mask,
)
from yuzogpt.model.shapes import count_weights

SHAPE = ModelSettings(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=65)
KINDS_OF = {
    "pos_emb": tuple(POSITION_KINDS),
    "norm": tuple(NORMS),
    "activation": tuple(ACTIVATIONS),
}


def shaped(**changes) -> ModelSettings:
    return ModelSettings.model_validate(SHAPE.model_dump() | changes)


def made(**changes) -> GPT:
    """Return a model whose attention is far from uniform, so that errors show."""
    model = GPT(shaped(**changes)).eval()
    initialize(model, 1)
    with torch.no_grad():
        for layer in model.h:
            layer.attn.c_attn.weight.mul_(10)
    return model


def heads(seed: int, T: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, T, 16, generator=generator) for _ in range(3))


def test_rotary_positions_are_those_of_gpt_neox():
    at = torch.arange(48)
    q, k, _ = heads(0, 48)
    config = GPTNeoXConfig(
        hidden_size=64, num_attention_heads=4, rotary_pct=1.0, max_position_embeddings=48
    )
    cos, sin = GPTNeoXRotaryEmbedding(config)(q, at[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    positions = RotaryPositions(SHAPE)
    context = AttentionContext(positions, positions.rotation(at), None)
    for found, wanted in zip(
        (context.apply_rotary(q), context.apply_rotary(k)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    positions, (q, k, _) = RotaryPositions(SHAPE), heads(1, 20)
    scores = []
    for first in (0, 1000):
        context = AttentionContext(
            positions, positions.rotation(torch.arange(first, first + 20)), None
        )
        scores.append(context.apply_rotary(q) @ context.apply_rotary(k).mT)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_head", [1, 2, 4, 6, 12, 16])
def test_alibi_slopes_are_the_papers(n_head):
    def slopes(n: int) -> list[float]:  # the paper's rule, by recursion
        if math.log2(n).is_integer():
            return [2 ** (-8 * (i + 1) / n) for i in range(n)]
        power = 2 ** math.floor(math.log2(n))
        return slopes(power) + slopes(2 * power)[0::2][: n - power]

    found = AlibiPositions(shaped(n_head=n_head, n_embd=12 * 16 * 4)).slopes(torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor(slopes(n_head)), rtol=1e-6, atol=0)


def test_alibi_attention_is_that_of_its_equation():
    shape = shaped(pos_emb="alibi")
    attention, positions = Attention(shape, 0), POSITION_KINDS["alibi"](shape)
    x, at = torch.randn(2, 24, 64, generator=torch.manual_seed(2)), torch.arange(24)
    mask = causal_mask(at, at, positions.bias(at, at))
    found = attention(x, None, AttentionContext(positions, None, mask))
    q, k, v = attention.c_attn(x).split(64, dim=-1)
    expected = torch.empty(2, 24, 64)
    for head, t in itertools.product(range(4), range(24)):  # one token of one head at a time
        own = slice(16 * head, 16 * head + 16)
        scores = torch.einsum("bd,bsd->bs", q[:, t, own], k[:, : t + 1, own]) / 4
        scores -= 2.0 ** (-2 * (head + 1)) * (t - torch.arange(t + 1))
        weights = scores.softmax(-1)
        expected[:, t, own] = torch.einsum("bs,bsd->bd", weights, v[:, : t + 1, own])
    torch.testing.assert_close(found, attention.c_proj(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pos_emb", ["learned", "rotary", "alibi"])
def test_attention_is_the_flash_kernels(pos_emb):
    model, ids = made(pos_emb=pos_emb), torch.zeros(2, 32, dtype=torch.long)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # and no other
        model(ids, ids).sum().backward()


@pytest.mark.parametrize("pos_emb", ["rotary", "alibi"])
def test_models_without_learned_positions_read_past_block_size(pos_emb):
    model = made(pos_emb=pos_emb)
    ids = torch.randint(0, 65, (2, 4 * 32), generator=torch.manual_seed(3))
    logits = model(ids)
    torch.testing.assert_close(model(ids[:, :32]), logits[:, :32], rtol=1e-4, atol=1e-4)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 65
    assert not torch.allclose(model(changed)[:, 100], logits[:, 100], atol=1e-6)
    assert not list(model.wpe.parameters())


@pytest.mark.parametrize("scores_at_once", [2**22, 1])
@pytest.mark.parametrize("pos_emb", ["learned", "rotary", "alibi"])
def test_attention_spelled_out_is_that_of_the_kernels(monkeypatch, pos_emb, scores_at_once):
    """All rows at once, and one by one."""
    monkeypatch.setattr("yuzogpt.model.attention.CPU_SCORES_PER_PASS", scores_at_once)
    shape = shaped(pos_emb=pos_emb)
    attention, positions, at = (
        Attention(shape, 0).eval(),
        POSITION_KINDS[pos_emb](shape),
        torch.arange(24),
    )
    mask = causal_mask(at, at, positions.bias(at, at))
    q, k, v = heads(4, 24)
    given = mask if pos_emb == "alibi" else None  # which is what a model gives
    found = attention._explicit_attention(q, k, v, None, given)
    wanted = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # "meta": as on GPUs, but for the numbers
def test_attention_spelled_out_takes_no_rows_too(device):
    q, k, v = (x[:0].to(device) for x in heads(4, 24))
    attention = Attention(shaped(dropout=0.1), 0).to(device).train()
    keys = torch.zeros(0, dtype=torch.int32, device=device)
    assert attention._explicit_attention(q, k, v, keys, None).shape == q.shape


@pytest.mark.parametrize("pos_emb", ["learned", "rotary", "alibi"])
def test_bfloat16_is_near_enough_in_both_ways_of_attention(monkeypatch, pos_emb):
    model, losses, gradients = made(pos_emb=pos_emb), [], []
    ids = torch.randint(0, 65, (3, 32), generator=torch.manual_seed(5))
    for has_bfloat16 in (False, True):
        monkeypatch.setattr("yuzogpt.model.attention.CPU_HAS_BFLOAT16", has_bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, ids).mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.h[0].attn.c_attn.weight.grad)
        model.zero_grad()
    assert not torch.equal(*losses)  # or there was one way only
    torch.testing.assert_close(*losses, rtol=2e-3, atol=0)
    difference = torch.linalg.vector_norm(gradients[0] - gradients[1])
    assert difference < 0.05 * torch.linalg.vector_norm(gradients[0])


@pytest.mark.parametrize("pos_emb", ["rotary", "alibi"])
def test_dropout_knows_every_kind_of_positions(pos_emb):
    model = made(pos_emb=pos_emb, dropout=0.3).train()
    ids = torch.randint(0, 65, (1, 32), generator=torch.manual_seed(4))
    later = ids.clone()
    later[0, 20] = (later[0, 20] + 1) % 65
    before, after = (model(x, row_keys=row_keys(1, 0, 1)) for x in (ids, later))
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("pos_emb", ["learned", "rotary", "alibi"])
@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
def test_bfloat16_stays_near_float32(pos_emb, activation):
    model = made(pos_emb=pos_emb, activation=activation, norm="rms", qk_norm=True)
    ids = torch.randint(0, 65, (2, 32), generator=torch.manual_seed(5))
    exact = model(ids, ids).mean()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, ids).float().mean()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kinds", list(itertools.product(*KINDS_OF.values())), ids="-".join)
def test_weights_of_every_variant_are_counted(kinds, bias, tied):
    changes = dict(zip(KINDS_OF, kinds, strict=True))
    shape = shaped(bias=bias, tie_embeddings=tied, n_head=2, n_embd=68, **changes)
    with torch.device("meta"):
        model = GPT(shape)
    weights = sum(p.numel() for p in model.parameters())
    assert count_weights(shape) == weights
    assert shape.matrix_weights == pytest.approx(weights, rel=0.1)


def test_perceptrons_are_those_of_their_papers():
    x = torch.randn(2, 3, 64, generator=torch.manual_seed(6))
    squared = made(activation="relu2").h[0].mlp
    torch.testing.assert_close(squared(x, None), squared.c_proj(F.relu(squared.c_fc(x)) ** 2))
    gated = made(activation="swiglu").h[0].mlp
    gate, value = gated.c_fc.weight.chunk(2)
    assert gate.shape == (176, 64)  # 8/3 of 64, up to a multiple of 8
    wanted = gated.c_proj((x @ gate.T).sigmoid() * (x @ gate.T) * (x @ value.T))
    torch.testing.assert_close(gated(x, None), wanted)


def test_norms_of_queries_and_keys_are_equal():
    model = made(qk_norm=True)
    with torch.no_grad():
        ids = torch.randint(0, 65, (2, 32), generator=torch.manual_seed(7))
        before = model(ids)
        for layer in model.h:
            layer.attn.c_attn.weight[:128] *= 7  # queries and keys; values stay
        torch.testing.assert_close(model(ids), before, rtol=1e-3, atol=1e-4)


def test_logits_stay_below_their_cap():
    free, capped = made(), made(logit_softcap=0.05)
    ids = torch.randint(0, 65, (2, 32), generator=torch.manual_seed(8))
    logits = free(ids)
    assert logits.abs().max() > 0.05
    assert capped(ids).abs().max() < 0.05 + 1e-6
    torch.testing.assert_close(capped(ids), 0.05 * torch.tanh(logits / 0.05))


def test_an_untied_head_learns_on_its_own():
    model = made(tie_embeddings=False).train()
    assert model.lm_head.weight.shape == model.wte.weight.shape == (128, 64)
    assert not torch.equal(model.lm_head.weight, model.wte.weight)
    assert not model.lm_head.weight[65:].any()
    ids = torch.full((1, 8), 3)
    model(ids, ids).sum().backward()
    assert set(model.wte.weight.grad.nonzero()[:, 0].tolist()) == {3}
    assert model.lm_head.weight.grad[:65].all(dim=1).any()


@pytest.mark.parametrize(("way", "times"), [("scaled", 0.25), ("plain", 1.0), ("zero", 0.0)])
def test_what_ends_in_the_residual_stream_starts_as_asked(way, times):
    shape = shaped(n_layer=8, n_embd=128)
    settings = InitializationSettings(init_std=0.05, residual_init=way)
    weights = dict(initial_weights(shape, 1, settings))
    assert weights["h.3.mlp.c_fc.weight"].std().item() == pytest.approx(0.05, rel=0.03)
    found = weights["h.3.mlp.c_proj.weight"].std().item()
    assert found == pytest.approx(0.05 * times, rel=0.03)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "logit_softcap": 2.0}])
def test_losses_in_pieces_are_those_at_once(changes, monkeypatch):
    model = made(**changes).train()
    ids = torch.randint(0, 65, (3, 33), generator=torch.manual_seed(9))
    found = []
    for at_once in (2**26, 7 * 65):  # 96 tokens: 13 pieces of 7, and one of 5
        monkeypatch.setattr("yuzogpt.model.gpt.LOGITS_PER_PASS", at_once)
        losses = model(ids[:, :-1], ids[:, 1:])
        losses.mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        found.append((losses.detach(), gradients))
    (losses, gradients), (in_pieces, others) = found
    torch.testing.assert_close(in_pieces, losses)
    for name, gradient in gradients.items():
        assert gradient.any()
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)
