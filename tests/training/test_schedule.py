"""The learning rate over a run's life: ends beyond the decay, later ends, further decays."""

import pytest

from tests.conftest import tiny_settings, yuzogpt
from tests.training.worlds import records, train_here
from yuzogpt import runs
from yuzogpt.config import TrainSettings, with_changes
from yuzogpt.config.resolve import preset_names, resolve
from yuzogpt.errors import UserError
from yuzogpt.training.schedules import lr_at

LINEAR = ("--lr_schedule=linear", "--warmup_iters=0", "--lr_decay_iters=10", "--min_lr=0")
WSD = ("--lr_schedule=wsd", "--warmup_iters=2", "--lr_decay_iters=20", "--cooldown_iters=6")
COSINE = ("--warmup_iters=2", "--lr_decay_iters=20", "--min_lr=1e-3")


def rates(run):
    """Return the learning rate of each step that a run recorded."""
    return {record["step"]: record["lr"] for record in records(run, "train")}


def notices(run):
    return [record["text"] for record in records(run, "notice")]


@pytest.fixture
def settings_of(corpus_dir, tmp_path):
    """Return the settings of a run in a directory of the test's."""
    return lambda *flags: tiny_settings(corpus_dir, tmp_path / "run", *flags)


def test_steps_at_learning_rate_0_are_refused_before_anything_is_written(corpus_dir, tmp_path):
    """As a command: the laptop's fast recipe, prolonged by its last step alone."""
    run = tmp_path / "run"
    command = ("train", "shakespeare_char_fast", f"--data_dir={corpus_dir}", f"--out_dir={run}")
    refused = yuzogpt(*command, "--max_iters=1000", "--num_workers=0")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--max_iters=1000" in refused.stderr
    assert "learning rate 0 from step 200 on" in refused.stderr
    assert "--lr_decay_iters=1000" in refused.stderr
    assert not run.exists()


def test_a_finished_run_is_not_prolonged_at_learning_rate_0(settings_of, tmp_path):
    train_here(settings_of(*LINEAR, "--max_iters=10"))
    with pytest.raises(UserError, match=r"--redecay=10\.\.30@"):
        runs.check(settings_of(*LINEAR, "--max_iters=30"))
    with pytest.raises(UserError, match="learning rate 0"):  # from 0 to 0
        runs.check(settings_of(*LINEAR, "--max_iters=30", "--redecay=10..30"))
    with pytest.raises(UserError, match=r"from step 1 on; .*--redecay=10\.\.30"):
        runs.check(settings_of(*LINEAR, "--max_iters=30", "--lr_decay_iters=30"))
    assert max(rates(tmp_path / "run")) == 10


def test_a_further_decay_keeps_the_past_and_is_resumed_exactly(settings_of, corpus_dir, tmp_path):
    train_here(settings_of(*LINEAR, "--max_iters=10"))
    before = rates(tmp_path / "run")
    again = (*LINEAR, "--max_iters=20", "--redecay=10..20@0.005")
    train_here(settings_of(*again, "--max_iters=14"))
    train_here(settings_of(*again))
    found = rates(tmp_path / "run")
    assert {step: found[step] for step in before} == before
    assert [found[step] for step in range(11, 21)] == pytest.approx(
        [0.005 * (1 - step / 10) for step in range(10)]
    )
    train_here(settings_of(*again, "--max_iters=25", "--redecay=10..20@0.005,20..25@0.001"))
    assert rates(tmp_path / "run")[21] == 0.001
    # The settings say all of it: another run of them has the same learning rates.
    found = resolve(TrainSettings, [str(tmp_path / "run" / runs.SETTINGS)], [])
    train_here(with_changes(found, {"run.out_dir": str(tmp_path / "other")}))
    assert rates(tmp_path / "other") == rates(tmp_path / "run")


def test_a_further_decay_begins_at_the_present_rate_or_warms_up(settings_of):
    def rate(step, *flags):
        settings = settings_of(*COSINE, *flags)
        return lr_at(step, settings.optimizer, settings.schedule)

    present = rate(12)
    assert 1e-3 < present < 1e-2
    assert rate(12, "--redecay=12..40") == pytest.approx(present)
    assert rate(11, "--redecay=12..40") == rate(11)
    assert 1e-3 < rate(30, "--redecay=12..40") < present
    assert rate(40, "--redecay=12..40") == 1e-3
    # Two steps of warmup to a higher rate, from the one that was.
    warm = [rate(step, "--redecay=12..40@0.01") for step in (12, 13, 14)]
    assert warm == pytest.approx([present + (0.01 - present) * k / 3 for k in (1, 2, 3)])


@pytest.mark.parametrize(
    "flags",
    [
        (*WSD, "--lr_decay_iters=30"),
        (*WSD, "--lr_decay_iters=30", "--cooldown_iters=10", "--min_lr=0"),
        ("--decay_lr=False", "--warmup_iters=9"),
    ],
)
def test_a_later_end_is_allowed_where_the_past_stays_what_it_was(settings_of, tmp_path, flags):
    first = WSD if "wsd" in flags[0] else ("--decay_lr=False",)
    train_here(settings_of(*first, "--max_iters=14"))
    before = rates(tmp_path / "run")
    train_here(settings_of(*flags, "--max_iters=16"))
    after = rates(tmp_path / "run")
    assert {step: after[step] for step in before} == before
    assert after[16] == 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "flag", "step"),
    [
        ((*WSD, "--max_iters=16"), "--lr_decay_iters=30", 15),  # its cooldown has begun
        ((*COSINE, "--max_iters=12"), "--lr_decay_iters=30", 3),
        ((*COSINE, "--max_iters=12"), "--redecay=11..30@0.01", 11),
        ((*COSINE, "--max_iters=12"), "--warmup_iters=3", 0),
        ((*COSINE, "--max_iters=12"), "--decay_lr=False", 0),
    ],
)
def test_what_would_change_the_past_is_refused_from_which_step_on(settings_of, first, flag, step):
    train_here(settings_of(*first))
    with pytest.raises(
        UserError, match=f"the learning rate of steps already made, from step {step} on"
    ):
        runs.check(settings_of(*first, "--max_iters=30", flag))


def test_a_run_beyond_its_decay_says_from_where_on_it_stays_at_min_lr(settings_of, tmp_path):
    train_here(settings_of("--lr_decay_iters=8", "--min_lr=1e-3", "--max_iters=9"))
    (line,) = [text for text in notices(tmp_path / "run") if "min_lr" in text]
    assert line == "learning rate: stays at min_lr=0.001 from step 8 on (lr_decay_iters=8)"


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (("--decay_lr=False",), "raise --max_iters to continue"),
        (
            ("--lr_decay_iters=8",),
            "raise --max_iters, to 8 at most for the same decay, to continue",
        ),
        (
            ("--lr_decay_iters=4", "--min_lr=1e-3"),
            "raise --max_iters to N to continue at min_lr=0.001, with --redecay=4..N@RATE to decay",
        ),
        (
            (*LINEAR, "--lr_decay_iters=4"),
            "raise --max_iters to N, with --redecay=4..N@RATE to decay again, to continue",
        ),
    ],
)
def test_the_finished_line_fits_the_schedule(settings_of, flags, advice):
    assert advice in runs.check(settings_of(*flags, "--max_iters=4")).finished_line


@pytest.mark.parametrize("name", [one for one in preset_names() if not one.startswith("eval_")])
def test_no_preset_ends_beyond_its_decay(name):
    schedule = resolve(TrainSettings, [name], []).schedule
    assert schedule.decay_end is None or schedule.max_iters <= schedule.decay_end


def test_a_peak_below_min_lr_is_refused(settings_of):
    with pytest.raises(UserError, match=r"learning_rate=0\.01 is below min_lr=0\.1"):
        runs.check(settings_of("--min_lr=0.1"))
    runs.check(settings_of("--min_lr=0.1", "--decay_lr=False"))


def test_a_peak_below_the_default_min_lr_is_said(settings_of, tmp_path):
    train_here(settings_of("--learning_rate=1e-5", "--max_iters=1"))
    text = "the learning rate rises from 1e-05 to min_lr=6e-05: lower --min_lr"
    assert text in notices(tmp_path / "run")


@pytest.mark.parametrize("wrong", ["10", "30..10", "10..20@x", "10..20,5..30", "10..20@-1", "0..5"])
def test_a_further_decay_that_makes_no_sense_is_refused(settings_of, wrong):
    with pytest.raises(UserError, match="redecay"):
        settings_of(f"--redecay={wrong}")
