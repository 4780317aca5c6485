"""The GPT against transformers, and the properties that training relies on."""

import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from yuzogpt.checkpoints import huggingface
from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import ModelSettings
from yuzogpt.errors import UserError
from yuzogpt.model import gpt
from yuzogpt.model.dropout import Dropout, row_keys
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize

# The four sizes of GPT-2, shrunk: layers, heads and width keep their proportions.
SIZES = {"gpt2": (3, 3, 48), "medium": (4, 4, 64), "large": (5, 5, 80), "xl": (6, 5, 80)}


def reference(size: str, vocab_size: int = 101) -> GPT2LMHeadModel:
    """Return transformers' model with random weights, large enough that errors show."""
    n_layer, n_head, n_embd = SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=32,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, which start as constants
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def as_the_hub_has_it(model: GPT2LMHeadModel, folder) -> None:
    """Write the hub's layout: keys without prefix, causal masks beside the weights."""
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    state = {
        key.removeprefix("transformer."): tensor.clone()
        for key, tensor in model.state_dict().items()
        if key != "lm_head.weight"
    }
    for layer in range(model.config.n_layer):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, folder / "model.safetensors")


@torch.no_grad()
def assert_equal(ours: GPT, theirs: GPT2LMHeadModel) -> None:
    ids = torch.randint(0, theirs.config.vocab_size, (3, 32), generator=torch.manual_seed(1))
    expected = theirs(ids, labels=ids)
    logits = ours.eval()(ids)
    assert logits.abs().max() > 5  # the comparison means something
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    loss = ours(ids[:, :-1], ids[:, 1:]).mean()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["save_pretrained", "hub", "sharded"])
def test_transformers_weights_give_the_same_logits_and_loss(size, layout, tmp_path):
    theirs = reference(size)
    if layout == "hub":
        as_the_hub_has_it(theirs, tmp_path)
    else:
        theirs.save_pretrained(tmp_path, max_shard_size="50KB" if layout == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "sharded")
    assert_equal(load_model(resolve_model(str(tmp_path))), theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_our_weights_give_the_same_logits_in_transformers(bias, tmp_path):
    settings = ModelSettings(
        n_layer=3, n_head=3, n_embd=48, block_size=32, vocab_size=101, bias=bias
    )
    ours = GPT(settings)
    initialize(ours, 1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    huggingface.save(ours, tmp_path / "hf", None)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.vocab_size == 101
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("size", "shape", "millions"),
    [
        ("124m", (12, 12, 768), 124.4),
        ("350m", (24, 16, 1024), 354.8),
        ("774m", (36, 20, 1280), 774.0),
        ("1558m", (48, 25, 1600), 1557.6),
    ],
)
def test_the_four_sizes_have_gpt2s_parameters(size, shape, millions):
    from yuzogpt.config import TrainSettings
    from yuzogpt.config.resolve import resolve

    chosen = resolve(TrainSettings, [f"gpt2_{size}"], ["--bias=True", "--vocab_size=50257"]).model
    assert (chosen.n_layer, chosen.n_head, chosen.n_embd) == shape
    with torch.device("meta"):
        model = GPT(chosen)
    counted = model.num_parameters() + model.wpe.weight.numel()
    assert round(counted / 1e6, 1) == millions


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no model here"):
        load_model(resolve_model(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type is 'llama'"):
        load_model(resolve_model(str(tmp_path)))
    reference("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors only"):
        load_model(resolve_model(str(tmp_path)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_norm_epsilon", 1e-3),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ],
)
def test_other_arithmetic_is_refused(tmp_path, key, value):
    reference("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=key):
        load_model(resolve_model(str(tmp_path)))


def test_weights_that_do_not_fit_their_config_are_named(tmp_path):
    reference("gpt2").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"n_layer": 3', '"n_layer": 4'))
    with pytest.raises(UserError, match="say n_layer=4, its weights have 3 layers"):
        load_model(resolve_model(str(tmp_path)))


SMALL = ModelSettings(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65, dropout=0.0)


def test_initialization_is_gpt2s_and_depends_on_the_seed_alone():
    settings = SMALL.model_copy(update={"n_layer": 8, "n_embd": 128, "bias": True})
    models = [GPT(settings) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialize(model, seed)
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["wpe.weight"], other["wpe.weight"])
    assert first["h.0.attn.c_attn.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert first["h.0.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert torch.equal(first["h.0.mlp.c_fc.bias"], torch.zeros(512))
    assert torch.equal(first["ln_f.weight"], torch.ones(128))
    ids, targets = torch.randint(0, 65, (2, 32, 16), generator=torch.manual_seed(1))
    assert models[0](ids, targets).mean().item() == pytest.approx(math.log(65), abs=0.1)


def test_padding_of_the_vocabulary_changes_nothing():
    model = GPT(SMALL)
    initialize(model, 1)
    assert model.wte.weight.shape == (128, 32)
    ids = torch.randint(0, 65, (2, 16))
    logits = model(ids)
    assert logits.shape == (2, 16, 65)
    model(ids, ids).sum().backward()
    assert not model.wte.weight.grad[65:].any()
    with torch.no_grad():
        model.wte.weight[65:] = 1e6
    assert torch.equal(model(ids), logits)


def test_tokens_do_not_see_the_future():
    model = GPT(SMALL).eval()
    initialize(model, 1)
    ids = torch.randint(0, 65, (1, 16))
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 65
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_dropout_masks_belong_to_rows_not_to_batches():
    model = GPT(SMALL.model_copy(update={"dropout": 0.3})).train()
    initialize(model, 1)
    ids = torch.randint(0, 65, (6, 16))
    together = model(ids, ids, row_keys(7, 100, 6))
    apart = torch.cat(
        [model(ids[i : i + 2], ids[i : i + 2], row_keys(7, 100 + i, 2)) for i in (0, 2, 4)]
    )
    torch.testing.assert_close(together, apart)
    assert not torch.allclose(together, model(ids, ids, row_keys(8, 100, 6)))
    assert not torch.allclose(together, model(ids, ids, row_keys(7, 101, 6)))
    model.eval()
    torch.testing.assert_close(model(ids, ids), model(ids, ids, row_keys(8, 0, 6)))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_the_right_share_everywhere(p):
    rows, count = 64, 4096
    x = torch.ones(rows, count)
    first = Dropout(p, site=1).train()(x, row_keys(3, 0, rows))
    second = Dropout(p, site=2).train()(x, row_keys(3, 0, rows))
    dropped = first == 0
    deviation = math.sqrt(p * (1 - p) / (rows * count))
    assert abs(dropped.float().mean().item() - p) < 5 * deviation
    # No row, no column and no pair of neighbours stands out, and sites are independent.
    assert (dropped.float().mean(1) - p).abs().max() < 6 * math.sqrt(p * (1 - p) / count)
    assert (dropped.float().mean(0) - p).abs().max() < 6 * math.sqrt(p * (1 - p) / rows)
    for pair in (
        dropped[:, 1:] & dropped[:, :-1],
        dropped & (second == 0),
        dropped[1:] & dropped[:-1],
    ):
        assert abs(pair.float().mean().item() - p * p) < 6 * p / math.sqrt(pair.numel())
    assert first.mean().item() == pytest.approx(1, abs=0.01)
    assert Dropout(p, site=1).eval()(x, None) is x


def test_gradients_of_losses_in_pieces_are_added_up_in_float32(monkeypatch):
    """In bfloat16, too: pieces cost no precision."""
    shape = ModelSettings(n_layer=1, n_head=2, n_embd=64, block_size=32, vocab_size=500)
    model = GPT(shape)
    initialize(model, 1)
    ids = torch.randint(0, 500, (16, 33), generator=torch.Generator().manual_seed(1))

    def gradient(tokens_at_once, *, rounded):
        monkeypatch.setattr(gpt, "LOGITS_PER_PASS", 500 * tokens_at_once)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            losses = model(ids[:, :-1], ids[:, 1:])
        losses.mean().backward()
        return model.wte.weight.grad.clone()

    exact = gradient(512, rounded=False)
    at_once, in_pieces = ((gradient(n, rounded=True) - exact).norm() for n in (512, 16))
    assert in_pieces <= 1.1 * at_once
