"""Finetuning: what a pretrained model gives a run, what of it learns, and what cannot fit."""

import shutil

import pytest
import torch

from tests.conftest import TINY, yuzogpt
from tests.training.worlds import losses, records, run_world, weights
from yuzogpt import checkpoints, runs
from yuzogpt.checkpoints import huggingface
from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import TrainSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.errors import UserError
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training.launch import work
from yuzogpt.training.layer_stats import layer_name

pytestmark = pytest.mark.slow

# The shape is the pretrained model's.
SHAPE = ("--n_layer", "--n_head", "--n_embd", "--block_size")
FLAGS = [flag for flag in TINY if flag.partition("=")[0] not in SHAPE]


def flags_of(corpus, out_dir, start, *flags):
    """Return the flags of a run that starts from a pretrained model."""
    return [*FLAGS, f"--data_dir={corpus}", f"--out_dir={out_dir}", f"--init_from={start}", *flags]


def check(*places_and_flags):
    return runs.check(resolve(TrainSettings, [], flags_of(*places_and_flags)))


def train(*places_and_flags):
    """Check and run as the command line does, in this process."""
    settings = check(*places_and_flags).settings
    with runs.hold_run_dir(settings):
        work(settings, World(), lambda *_: None, None, StopRequest())


def test_the_shape_is_the_pretrained_models(corpus_dir, pretrained, tmp_path):
    places = (corpus_dir, tmp_path / "run", pretrained)
    settings = check(*places, "--dropout=0.1").settings
    shape, _ = huggingface.read(str(pretrained))
    assert settings.model == shape.model_copy(update={"dropout": 0.1})
    # It stands in the settings that the run leaves, too: they start the same run elsewhere.
    train(*places, "--max_iters=2", "--block_size=8", "--dropout=0.1")
    again = resolve(TrainSettings, [str(tmp_path / "run" / "settings.yaml")], [])
    assert again.model == settings.model.model_copy(update={"block_size": 8})
    assert load_model(resolve_model(str(tmp_path / "run"))).settings == again.model
    # The run resumes with its shape, and with no other.
    train(*places, "--max_iters=3", "--dropout=0.1")
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]
    for flags, difference in (
        (["--dropout=0.1", "--n_head=4"], "model.n_head: 3 -> 4"),
        (["--dropout=0.1", "--block_size=16"], "model.block_size: 8 -> 16"),
        ([], "model.dropout: 0.1 -> 0.0"),
    ):
        with pytest.raises(UserError, match=difference):
            check(*places, *flags)


def test_the_first_weights_are_the_pretrained_models(corpus_dir, pretrained, tmp_path):
    flags = ("--max_iters=1", "--block_size=8", "--learning_rate=0", "--decay_lr=False")
    train(corpus_dir, tmp_path / "run", pretrained, *flags)
    before = load_model(resolve_model(str(pretrained)))
    tuned = load_model(resolve_model(str(tmp_path / "run")))
    ids = torch.randint(0, before.settings.vocab_size, (4, 8), generator=torch.manual_seed(1))
    assert torch.equal(before(ids), tuned(ids))


# How a run of 12 steps is made: by how many ranks, to which step, and with which flags. "mixed"
# resumes from what "fsdp, resumed" has made by step 6.
FSDP = "--parallel=fsdp"
WAYS = {
    "one": [(1, 12)],
    "ddp": [(2, 12)],
    "ddp, resumed": [(2, 6), (2, 12)],
    "fsdp": [(2, 12, FSDP)],
    "fsdp, resumed": [(2, 6, FSDP), (2, 12, FSDP)],
    "mixed": [(1, 12, "--activation_checkpointing=True")],
}
FROZEN = ("wte.", "wpe.", "h.0.", "h.1.")


@pytest.fixture(scope="module")
def ways(corpus_dir, pretrained, tmp_path_factory):
    """Runs with the embeddings and two of three layers frozen, and rates that differ."""
    root = tmp_path_factory.mktemp("ways")
    flags = ["--freeze_layers=2", "--layer_lr_decay=0.5", "--dropout=0.1", "--health_interval=6"]
    # The batch is odd: one rank ends with an empty micro-batch.
    flags += ["--batch_size=1", "--gradient_accumulation_steps=7", "--grad_clip=0.1"]
    for way, parts in WAYS.items():
        for size, max_iters, *more in parts:
            places = (corpus_dir, root / way, pretrained)
            every = (*places, *flags, f"--max_iters={max_iters}", *more)
            if size == 1:
                train(*every)
            else:
                run_world(size, resolve(TrainSettings, [], flags_of(*every)))
            if (way, max_iters) == ("fsdp, resumed", 6):
                shutil.copytree(root / way, root / "mixed")
    return root


def tensors(run, kind, step=12):
    directory = run / "checkpoints" / f"step-{step}"
    return dict(checkpoints.read(LocalStorage(directory)).tensors(kind))


def test_frozen_layers_stay_and_the_rest_learns_in_any_world(ways, pretrained):
    before = huggingface.read(str(pretrained))[1]
    one = losses(ways / "one")
    assert one[12] < one[1]
    for way in WAYS:
        after = tensors(ways / way, "model")
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if not name.startswith(FROZEN)}, way
        state = {name.partition("/")[2] for name in tensors(ways / way, "optimizer")}
        assert state == changed
        for step, loss in losses(ways / way).items():
            assert loss == pytest.approx(one[step], abs=1e-4), way


def test_resuming_with_frozen_layers_is_exact(ways):
    for kind in ("ddp", "fsdp"):
        assert losses(ways / kind) == losses(ways / f"{kind}, resumed")
        assert weights(ways / kind, 12) == weights(ways / f"{kind}, resumed", 12)


def test_health_is_of_what_learns(ways):
    for way in ("one", "fsdp"):
        for record in records(ways / way, "health"):
            assert list(record["layers"]) == ["h.2", "ln_f"]
            assert all(found["update_to_weight"] > 0 for found in record["layers"].values())
        notices = [record["text"] for record in records(ways / way, "notice")]
        assert any("frozen: embeddings and the first 2 layers" in text for text in notices)


def test_a_layers_rate_is_that_of_the_one_above_times_the_decay(corpus_dir, pretrained, tmp_path):
    # AdamW's first step is the learning rate long, in every direction.
    flags = ["--layer_lr_decay=0.5", "--decay_lr=False", "--learning_rate=1e-3", "--max_iters=1"]
    train(corpus_dir, tmp_path / "run", pretrained, *flags, "--weight_decay=0", "--grad_clip=0")
    before = huggingface.read(str(pretrained))[1]
    steps = {}
    for name, after in tensors(tmp_path / "run", "model", step=1).items():
        step = (after - before[name]).abs().max().item()
        steps[layer_name(name)] = max(step, steps.get(layer_name(name), 0.0))
    rates = {"ln_f": 1, "h.2": 0.5, "h.1": 0.25, "h.0": 0.125, "wte": 0.0625, "wpe": 0.0625}
    assert steps == {layer: pytest.approx(1e-3 * rate, rel=0.01) for layer, rate in rates.items()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--freeze_layers=4", "--freeze_layers=4: the model has 3 layers"),
        ("--freeze_layers=1 --init_from=scratch", "new weights must learn"),
        ("--layer_lr_decay=0", "--layer_lr_decay=0: "),
        ("--n_head=4", "its n_head is 3, not 4; leave n_head out"),
        ("--n_layer=12", "its n_layer is 3, not 12; leave n_layer out"),
        ("--bias=False", "its bias is True, not False; leave bias out"),
        ("--block_size=64", "has positions for 32 tokens; lower --block_size=64"),
    ],
)
def test_what_cannot_fit_is_refused(flags, message, corpus_dir, pretrained, tmp_path):
    places = (corpus_dir, tmp_path / "run", pretrained)
    result = yuzogpt("train", *flags_of(*places, *flags.split()))
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_without_whole_weights_is_refused(corpus_dir, pretrained, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((pretrained / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        check(corpus_dir, tmp_path / "run", tmp_path / "hf")
    weights = (pretrained / "model.safetensors").read_bytes()
    (tmp_path / "hf" / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UserError, match="damaged, or not downloaded to its end"):
        load_model(resolve_model(str(tmp_path / "hf")))
    (tmp_path / "hf" / "config.json").write_text('{"n_layer": "three"}')
    with pytest.raises(UserError, match="not the config of a GPT-2"):
        resolve_model(str(tmp_path / "hf"))


NO_WEB = {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("environment", "flags"),
    [
        (NO_WEB, ["--num_workers=0"]),
        ({"HF_HUB_OFFLINE": "1"}, ["--num_workers=2"]),
        (NO_WEB, ["--ray_address=127.0.0.1:9"]),  # a cluster's nodes would find no weights either
    ],
    ids=["this process", "embedded Ray, told to be offline", "a cluster"],
)
def test_published_weights_out_of_reach(environment, flags, gpt2_corpus_dir, tmp_path):
    flags = flags_of(gpt2_corpus_dir, tmp_path / "run", "gpt2", "--block_size=64", *flags)
    result = yuzogpt("train", *flags, HF_HOME=str(tmp_path / "hf"), **environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "gpt2: the weights are neither in Hugging Face's cache nor within reach" in result.stderr
    assert "hf download openai-community/gpt2 config.json model.safetensors" in result.stderr
    assert not (tmp_path / "run").exists()
