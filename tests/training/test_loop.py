"""The loop in this process: evaluation, schedule, optimizer, accumulation, starting weights."""

import contextlib
import json
import shutil

import pytest
import torch

from tests.conftest import make_text, prepare_char_corpus, tiny_settings
from tests.training.worlds import losses, records
from yuzogpt import checkpoints, runs
from yuzogpt.checkpoints.export import to_huggingface
from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import (
    FinetuningSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)
from yuzogpt.config.resolve import resolve
from yuzogpt.data.blocks import open_corpus
from yuzogpt.errors import RunFailed, UserError
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize
from yuzogpt.runs.stop_request import StopRequest
from yuzogpt.runtime.world import World
from yuzogpt.storage.atomic_files import sha256
from yuzogpt.storage.lease import LEASE
from yuzogpt.training.launch import work
from yuzogpt.training.optimizers import build_optimizer, load_state_tensors, state_tensors
from yuzogpt.training.schedules import lr_at


def train(corpus, out_dir, *flags):
    """Check and run as the command line does, in this process; return what was reported."""
    settings = runs.check(tiny_settings(corpus, out_dir, *flags)).settings
    reported = []
    with runs.hold_run_dir(settings):
        work(
            settings, World(), lambda metrics, path: reported.append((metrics, path)), None,
            StopRequest(),
        )  # fmt: skip
    return reported


@pytest.fixture(scope="module")
def finished(corpus_dir, tmp_path_factory):
    """A run of 60 steps. Read only."""
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    train(corpus_dir, out_dir, "--max_iters=60", "--eval_interval=20")
    return out_dir


def test_it_learns_and_keeps_the_best_and_two_newest(finished):
    by_step = losses(finished)
    assert by_step[60] < 0.7 * by_step[1]
    evaluations = {r["step"]: r["val_loss_estimate"] for r in records(finished, "evaluation")}
    assert sorted(evaluations) == [0, 20, 40, 60]
    best = min(list(evaluations)[1:], key=evaluations.__getitem__)
    kept = [checkpoints.step_of(path) for path in checkpoints.candidates(finished)]
    assert kept == sorted({best, 40, 60})
    assert records(finished, "final")[0]["best_step"] == best


def test_val_loss_is_the_mean_over_the_whole_split(finished, corpus_dir):
    corpus = open_corpus(corpus_dir)
    model = load_model(resolve_model(str(finished / "checkpoints" / "step-60")))
    stream = corpus.stream("val")
    tokens = torch.tensor(stream.read(0, len(stream)).astype("int64"))
    windows = (len(tokens) - 1) // 16
    ids, targets = tokens[: windows * 16].view(-1, 16), tokens[1 : windows * 16 + 1].view(-1, 16)
    with torch.no_grad():
        expected = model(ids, targets).double().mean().item()
    assert records(finished, "final")[0]["val_loss"] == pytest.approx(expected, abs=1e-6)


def test_a_finished_run_is_finished(finished, corpus_dir):
    same = tiny_settings(corpus_dir, finished, "--max_iters=60", "--eval_interval=20")
    assert runs.check(same).is_finished
    assert not runs.check(tiny_settings(corpus_dir, finished, "--max_iters=61")).is_finished


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        ("--n_layer=3", "model.n_layer: 2 -> 3"),
        ("--seed=5", "run.seed: 1337 -> 5"),
        ("--learning_rate=0.5", "optimizer.learning_rate: 0.01 -> 0.5"),
        ("--gradient_accumulation_steps=4", "12 -> 16 rows"),
        ("--dropout=0.1", "model.dropout: 0.0 -> 0.1"),
        ("--val_part=first", "evaluation.val_part: whole -> first"),
    ],
)
def test_changed_settings_are_refused_with_the_difference(finished, corpus_dir, flag, difference):
    with pytest.raises(UserError) as error:
        runs.check(tiny_settings(corpus_dir, finished, flag))
    assert difference in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_iters=200"],
        ["--log_interval=3", "--eval_interval=7", "--num_workers=4"],
        ["--batch_size=2", "--gradient_accumulation_steps=6"],  # the same global batch
        ["--val_part=second", "--eval_only"],
    ],
)
def test_what_may_change_may_change(finished, corpus_dir, flags):
    resume = runs.check(tiny_settings(corpus_dir, finished, *flags)).resume
    assert resume
    assert resume.state.step == 60


def test_another_corpus_is_refused(finished, tmp_path):
    (tmp_path / "t.txt").write_text(make_text(20_000, seed=9))
    other = prepare_char_corpus(tmp_path / "t.txt", tmp_path / "corpus")
    with pytest.raises(UserError, match="its manifest has changed"):
        runs.check(tiny_settings(other, finished))


def test_accumulation_does_not_change_the_losses(corpus_dir, tmp_path):
    train(corpus_dir, tmp_path / "a", "--max_iters=10")
    train(
        corpus_dir, tmp_path / "b", "--max_iters=10", "--batch_size=12",
        "--gradient_accumulation_steps=1",
    )  # fmt: skip
    for step, loss in losses(tmp_path / "a").items():
        assert losses(tmp_path / "b")[step] == pytest.approx(loss, abs=1e-5)


def test_a_corrupt_checkpoint_is_set_aside_loudly(corpus_dir, tmp_path):
    out_dir, saved = tmp_path / "run", tmp_path / "step-10"
    train(corpus_dir, out_dir, "--max_iters=10")
    shutil.copytree(out_dir / "checkpoints" / "step-10", saved)
    train(corpus_dir, out_dir, "--max_iters=20")
    whole = losses(out_dir)
    if not (out_dir / "checkpoints" / "step-10").exists():  # pruned, if step 20 is the best
        shutil.copytree(saved, out_dir / "checkpoints" / "step-10")
    model = out_dir / "checkpoints" / "step-20" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    train(corpus_dir, out_dir, "--max_iters=20")
    assert losses(out_dir) == whole
    notices = [record["text"] for record in records(out_dir, "notice")]
    assert any(text.startswith("!!! checkpoint step-20 is corrupt") for text in notices)
    assert (out_dir / "checkpoints" / "broken-step-20-0").is_dir()


def test_report_is_called_at_checkpoints_only(corpus_dir, tmp_path):
    reported = train(corpus_dir, tmp_path / "run", "--max_iters=25", "--eval_interval=10")
    assert [path.name for _, path in reported] == ["step-10", "step-20", "step-25"]


def test_eval_only_trains_nothing(corpus_dir, tmp_path):
    train(corpus_dir, tmp_path / "run", "--eval_only")
    assert records(tmp_path / "run", "eval_only")[0]["val_loss"] == pytest.approx(3.2, abs=0.5)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_finetuning_starts_from_other_weights_and_resumes(finished, corpus_dir, tmp_path):
    out_dir = tmp_path / "tuned"
    flags = [f"--init_from={finished}", "--block_size=8", "--eval_interval=5"]
    train(corpus_dir, out_dir, *flags, "--max_iters=5")
    assert losses(out_dir)[1] < 0.5 * losses(finished)[1]
    train(corpus_dir, out_dir, *flags, "--max_iters=10")
    assert sorted(losses(out_dir)) == list(range(1, 11))


def test_a_vocabulary_that_does_not_fit_is_refused(corpus_dir, tmp_path):
    with pytest.raises(UserError, match="the corpus mine has"):
        runs.check(tiny_settings(corpus_dir, tmp_path / "run", "--vocab_size=99"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps({"vocab_size": 50257, "n_positions": 1024})
    )
    with pytest.raises(UserError, match="its vocabulary has 50257 tokens"):
        runs.check(tiny_settings(corpus_dir, tmp_path / "run", f"--init_from={tmp_path / 'hf'}"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(finished, tmp_path):
    text = make_text(20_000).translate(str.maketrans("ghi", "GHI"))  # as many characters, others
    (tmp_path / "t.txt").write_text(text)
    other = prepare_char_corpus(tmp_path / "t.txt", tmp_path / "corpus")
    with pytest.raises(UserError, match="its tokenizer is not the one that made the corpus"):
        runs.check(tiny_settings(other, tmp_path / "run", f"--init_from={finished}"))


def test_resume_by_name_leaves_no_trace(corpus_dir, tmp_path):
    out_dir = tmp_path / "run"
    train(corpus_dir, out_dir, "--max_iters=2")
    train(corpus_dir, out_dir, "--max_iters=4", "--init_from=resume")
    train(corpus_dir, out_dir, "--max_iters=6")
    with pytest.raises(UserError, match=r"model.n_layer: 2 -> 3"):
        runs.check(tiny_settings(corpus_dir, out_dir, "--init_from=resume", "--n_layer=3"))


def test_overwrite_does_not_delete_what_it_starts_from(finished, corpus_dir):
    for start in ("resume", finished, finished / "checkpoints" / "step-60"):
        with pytest.raises(UserError, match="--overwrite would delete"):
            runs.check(tiny_settings(corpus_dir, finished, "--overwrite", f"--init_from={start}"))


def test_the_settings_that_a_run_leaves_do_not_overwrite_it(corpus_dir, tmp_path):
    train(corpus_dir, tmp_path / "run", "--max_iters=3", "--overwrite")
    again = resolve(TrainSettings, [str(tmp_path / "run" / "settings.yaml")], [])
    assert runs.check(again).is_finished


def test_all_checkpoints_broken_is_said_by_workers_too(corpus_dir, tmp_path):
    out_dir = tmp_path / "run"
    train(corpus_dir, out_dir, "--max_iters=3")
    before = (out_dir / "metrics.jsonl").read_bytes()
    (out_dir / "checkpoints" / "step-3" / "model.safetensors").unlink()
    settings = tiny_settings(corpus_dir, out_dir, "--max_iters=3")
    settings = runs.check_vocabulary(settings, open_corpus(corpus_dir))
    with pytest.raises(UserError, match="no checkpoint is whole any more"):
        work(settings, World(), lambda *_: None, None, StopRequest())
    assert (out_dir / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="no checkpoint is whole any more"):  # it was set aside
        runs.check(tiny_settings(corpus_dir, out_dir, "--max_iters=3"))


def test_settings_of_another_version_do_not_hinder(corpus_dir, tmp_path):
    out_dir = tmp_path / "run"
    train(corpus_dir, out_dir, "--max_iters=3")
    directory = out_dir / "checkpoints" / "step-3"
    state = json.loads((directory / "state.json").read_text())
    state["settings"]["log"]["gone_since"] = True
    del state["settings"]["optimizer"]["grad_clip"]  # as before it came, with its default
    (directory / "state.json").write_text(json.dumps(state))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["state.json"] = sha256(directory / "state.json")
    (directory / "manifest.json").write_text(json.dumps(manifest))
    train(corpus_dir, out_dir, "--max_iters=5")
    assert sorted(losses(out_dir)) == [1, 2, 3, 4, 5]
    assert load_model(resolve_model(str(out_dir))).settings.n_layer == 2


def test_eval_only_evaluates_a_finished_run(finished, corpus_dir, capsys):
    run = runs.check(tiny_settings(corpus_dir, finished, "--max_iters=60", "--eval_only"))
    work(run.settings, World(), lambda *_: None, None, StopRequest())
    expected = records(finished, "final")[0]["val_loss"]
    assert records(finished, "eval_only")[-1]["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert run.is_finished


def test_eval_only_changes_no_run(corpus_dir, tmp_path):
    run = tmp_path / "run"
    train(corpus_dir, run, "--max_iters=8", "--eval_interval=5")
    shutil.rmtree(run / "checkpoints" / "step-8")  # as if it had been killed before
    before = (run / runs.SETTINGS).read_bytes(), (run / runs.METRICS).read_bytes()
    train(corpus_dir, run, "--max_iters=8", "--eval_interval=5", "--eval_only", "--batch_size=2",
          "--gradient_accumulation_steps=6")  # fmt: skip
    assert (run / runs.SETTINGS).read_bytes() == before[0]
    assert (run / runs.METRICS).read_bytes().startswith(before[1])
    assert records(run, "eval_only")[-1]["step"] == 5
    train(corpus_dir, tmp_path / "new", "--eval_only")
    assert (tmp_path / "new" / runs.SETTINGS).exists()  # what was asked for


def test_files_that_are_not_ours_are_not_replaced(corpus_dir, tmp_path):
    (tmp_path / "settings.yaml").write_text("n_layer: 3\n")
    (tmp_path / "checkpoints" / "precious").mkdir(parents=True)
    with pytest.raises(UserError, match=r"its settings\.yaml is not of a run"):
        runs.check(tiny_settings(corpus_dir, tmp_path))
    (tmp_path / "settings.yaml").unlink()
    train(corpus_dir, tmp_path, "--max_iters=2")
    train(corpus_dir, tmp_path, "--max_iters=2", "--overwrite")
    assert (tmp_path / "checkpoints" / "precious").is_dir()


def test_a_writer_whose_lease_is_anothers_writes_no_checkpoint(corpus_dir, tmp_path):
    settings = runs.check(tiny_settings(corpus_dir, tmp_path / "run", "--max_iters=5")).settings

    def taken_over(record):
        if record["kind"] == "train" and record["step"] == 3:
            found = json.loads((tmp_path / "run" / LEASE).read_text())
            (tmp_path / "run" / LEASE).write_text(json.dumps({**found, "id": "another"}))

    # The lease is held by hand: its own heart would end this process, as it should.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LEASE).write_text(json.dumps({"id": "x", "host": "", "process": 1}))
    (tmp_path / "run" / runs.SETTINGS).write_text(runs.SIGNATURE)
    with pytest.raises(RunFailed, match="another command has taken over"):
        work(settings, World(), lambda *_: None, taken_over, StopRequest())
    assert checkpoints.candidates(tmp_path / "run") == []


@pytest.mark.parametrize("is_restored", [True, False])
def test_a_lease_that_cannot_be_read_costs_a_checkpoint_and_no_run(
    corpus_dir, tmp_path, is_restored
):
    run = tmp_path / "run"
    flags = ("--max_iters=25", "--eval_interval=5", "--keep_best=9")
    settings = runs.check(tiny_settings(corpus_dir, run, *flags)).settings
    content = json.dumps({"id": "x", "host": "", "process": 1})

    def lose(record):
        if record["kind"] == "checkpoint" and record["step"] == 5:
            (run / LEASE).unlink()
        if is_restored and "step-10 could not be written" in record.get("text", ""):
            (run / LEASE).write_text(content)

    run.mkdir()
    (run / LEASE).write_text(content)  # by hand, and without a heart
    (run / runs.SETTINGS).write_text(runs.SIGNATURE)
    with contextlib.ExitStack() as stack:
        if not is_restored:
            stack.enter_context(pytest.raises(RunFailed, match="3 checkpoints in a row"))
        work(settings, World(), lambda *_: None, lose, StopRequest())
    kept = [checkpoints.step_of(path) for path in checkpoints.candidates(run)]
    assert kept == ([5, 15, 20, 25] if is_restored else [5])
    notices = [r["text"] for r in records(run, "notice") if "!!!" in r["text"]]
    assert all("its lease is gone" in text for text in notices)


def test_a_checkpoint_that_its_run_replaced_is_looked_up_again(corpus_dir, tmp_path):
    train(corpus_dir, tmp_path / "run", "--max_iters=2")
    reference = resolve_model(str(tmp_path / "run"))
    train(corpus_dir, tmp_path / "run", "--max_iters=60")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2", ignore_errors=True)
    assert load_model(reference).settings.n_layer == 2


def test_init_from_resume_insists(corpus_dir, tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        runs.check(tiny_settings(corpus_dir, tmp_path / "run", "--init_from=resume"))


def test_overwrite_starts_anew(corpus_dir, tmp_path):
    train(corpus_dir, tmp_path / "run", "--max_iters=5")
    train(corpus_dir, tmp_path / "run", "--max_iters=4", "--seed=2", "--overwrite")
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_schedule_is_nanogpts():
    optimizer = OptimizerSettings(learning_rate=1.0)
    schedule = ScheduleSettings(warmup_iters=9, lr_decay_iters=109, min_lr=0.1)
    assert lr_at(0, optimizer, schedule) == pytest.approx(0.1)
    assert lr_at(8, optimizer, schedule) == pytest.approx(0.9)
    assert lr_at(9, optimizer, schedule) == pytest.approx(1.0)
    assert lr_at(59, optimizer, schedule) == pytest.approx(0.55)
    assert lr_at(109, optimizer, schedule) == lr_at(10**9, optimizer, schedule) == 0.1
    constant = schedule.model_copy(update={"decay_lr": False})
    assert lr_at(0, optimizer, constant) == 1.0


def test_models_without_learned_positions_read_further(finished, corpus_dir, tmp_path):
    run = tmp_path / "run"
    train(corpus_dir, run, "--max_iters=20", "--pos_emb=rotary", "--qk_norm=True")
    model = load_model(resolve_model(str(run), context=64))
    ids = torch.randint(0, 20, (1, 64))
    assert model(ids).shape[:2] == (1, 64)
    with pytest.raises(UserError, match="no pos_emb=rotary, qk_norm=True; only models"):
        to_huggingface(resolve_model(str(run)), tmp_path / "hf")
    longer = tmp_path / "longer"  # and it then learns from longer rows
    train(corpus_dir, longer, "--max_iters=2", f"--init_from={run}", "--block_size=64")
    assert resolve_model(str(longer)).shape.block_size == 64
    with pytest.raises(UserError, match="learned positions, for 16 tokens"):
        resolve_model(str(finished), context=17)
    shorter = load_model(resolve_model(str(finished), context=8))
    assert torch.equal(shorter(ids[:, :8]), load_model(resolve_model(str(finished)))(ids[:, :8]))


def test_optimizer_state_round_trips_by_name():
    model = GPT(ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=5, bias=True))
    initialize(model, 1)
    optimizer = build_optimizer(model, OptimizerSettings(), FinetuningSettings())
    decayed, plain = optimizer.groups()
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert decayed["weight_decay"] == 0.1
    assert all(p.dim() < 2 for p in plain["params"])
    assert plain["weight_decay"] == 0.0
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, ids).sum().backward()
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in state_tensors(model, optimizer).items()}
    assert "exp_avg_sq/h.0.mlp.c_fc.weight" in saved
    fresh = build_optimizer(model, OptimizerSettings(), FinetuningSettings())
    load_state_tensors(model, fresh, saved.items())
    restored = state_tensors(model, fresh)
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
