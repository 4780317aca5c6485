"""What `yuzogpt.load` returns: texts are those of `yuzogpt sample`, numbers those of the model."""

import shutil
import threading

import pytest
import torch
from torch.nn import functional as F

import yuzogpt
from tests.conftest import yuzogpt as command
from tests.evaluation.models import exported, random_model
from yuzogpt.errors import UserError

SHORT = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with a random model. Read only."""
    return random_model(tmp_path_factory.mktemp("api") / "run")


@pytest.fixture(scope="module")
def model(run_dir):
    return yuzogpt.load(run_dir, device="cpu")


@pytest.mark.slow
def test_generate_is_sample(model, run_dir):
    options = {"temperature": 1.1, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
    flags = [f"--{key}={value}" for key, value in (options | {"max_new_tokens": 70}).items()]
    done = command(
        "sample", f"--out_dir={run_dir}", "--start=The king", "--num_samples=3", "--device=cpu",
        *flags,
    )  # fmt: skip
    printed = done.stdout.split("\n---------------\n")[:-1]
    options["max_new_tokens"] = 70  # past block_size
    assert [f"The king{text}" for text in model.generate("The king", num_samples=3, **options)] == (
        printed
    )
    alone = model.generate("The king", **options | {"seed": 6})
    assert f"The king{alone}" == printed[1]
    assert "".join(model.stream("The king", **options | {"seed": 6})) == alone


def test_streams_are_read_in_any_order_and_left_at_any_time(model):
    prompts = ["a", "The king", "night"]
    expected = [model.generate(prompt, **SHORT) for prompt in prompts]
    first, second, third = (model.stream(prompt, **SHORT) for prompt in prompts)
    read = next(first) + next(first)
    assert next(third)
    third.close()
    assert "".join(second) == expected[1]
    assert read + "".join(first) == expected[0]
    engine = model._engine(1).engine
    assert not engine.busy
    assert len(engine.free_slots) == engine.slots


def test_threads_share_a_model(model):
    prompts = ["a", "The king", "night", "of"]
    expected = [model.generate(prompt, **SHORT) for prompt in prompts]
    found = {}
    threads = [
        threading.Thread(target=lambda p=prompt: found.update({p: model.generate(p, **SHORT)}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in prompts] == expected


def test_logits_and_loss_are_those_of_the_module(model):
    assert type(model.model).__module__ == "yuzogpt.model.gpt"
    assert not model.model.training
    assert not model.logits("a").is_inference()  # one may go on computing with them
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    text, end = "all that ends well", 50256
    ids = torch.from_numpy(model.tokenizer.encode(text).astype("int64"))
    with torch.no_grad():
        assert torch.equal(model.logits(text), model.model(ids[None])[0])
        started = torch.cat((torch.tensor([end]), ids))
        loss = F.cross_entropy(model.model(started[None, :-1])[0], ids).item()
    assert model.loss(text) == pytest.approx(loss, rel=1e-6)
    assert model.loss(f"<|endoftext|>{text}") != model.loss(text)  # the token is scored
    greedy = model.logits(text)[-1].argmax()
    assert model.generate(text, temperature=0, max_new_tokens=1) == model.tokenizer.decode([greedy])


def test_the_loss_of_a_long_text_is_that_of_its_windows(model):
    text = "the king of night and all that ends " * 20
    ids = [50256, *model.tokenizer.encode(text).tolist()]
    total, done = 0.0, 0
    while done < len(ids) - 1:
        end = min(done + (32 if done else 64), len(ids) - 1)
        window = torch.tensor(ids[max(0, end - 64) : end + 1])
        with torch.no_grad():
            losses = F.cross_entropy(
                model.model(window[None, :-1])[0], window[1:], reduction="none"
            )
        total += losses[done - end :].sum().item()
        done = end
    assert model.loss(text) == pytest.approx(total / (len(ids) - 1), rel=1e-6)
    with pytest.raises(UserError, match=f"{len(ids) - 1} tokens; the model's context 64"):
        model.logits(text)


@pytest.mark.slow
def test_every_reference_loads(run_dir, model, tmp_path, monkeypatch):
    text = model.generate("a", **SHORT)
    folder = exported(shutil.copytree(run_dir, tmp_path / "run"))
    monkeypatch.chdir(run_dir.parent)
    for reference in ("run", run_dir, next((run_dir / "checkpoints").iterdir()), folder):
        assert yuzogpt.load(reference, device="cpu").generate("a", **SHORT) == text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temprature": 1}, "temprature=1: unknown setting; did you mean temperature"),
        ({"top_p": 2}, "top_p=2: .* less than or equal to 1"),
        ({"device": "cpu"}, "device='cpu': unknown setting"),
        ({"num_samples": 0}, "num_samples=0: give 1 or more"),
    ],
)
def test_mistakes_name_the_keyword(model, settings, words):
    with pytest.raises(UserError, match=words):
        model.generate("a", **settings)


def test_a_checkpoint_that_its_run_replaced_is_not_mixed_with_its_successor(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    loaded = yuzogpt.load(run)
    for weights in run.rglob("model.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match="has replaced this checkpoint; load it again"):
        loaded.generate("a")
    with pytest.raises(UserError, match="has replaced this checkpoint; load it again"):
        _ = loaded.model
