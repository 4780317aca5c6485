"""Schedules: formulas by step, the order of data, resuming in the middle, the noise scale."""

import pytest
import torch

from tests.conftest import tiny_settings
from tests.training.worlds import losses, records, run_world, weights
from yuzogpt import checkpoints, runs
from yuzogpt.config import BatchSettings, OptimizerSettings, ScheduleSettings
from yuzogpt.errors import UserError
from yuzogpt.runs import requirements
from yuzogpt.runtime.world import World
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training.batch_size import MEASURE_INTERVAL_STEPS, WARMUP_MEASUREMENTS, GlobalBatch
from yuzogpt.training.schedules import batch_lr_scale, lr_at

pytestmark = pytest.mark.slow

RAMPS = {
    "linear": ("--batch_schedule=linear", "--batch_start_rows=2", "--batch_ramp_iters=20"),
    "steps": ("--batch_schedule=steps", "--batch_start_rows=3", "--batch_ramp_iters=20"),
    "noise": ("--batch_schedule=noise", "--batch_start_rows=4"),
}
LAST = {"linear": 30, "steps": 30, "noise": 120}


def batch(kind: str, start: int, ramp: int, micro: int = 4, times: int = 4) -> BatchSettings:
    return BatchSettings(
        batch_size=micro, gradient_accumulation_steps=times, batch_schedule=kind,
        batch_start_rows=start, batch_ramp_iters=ramp,
    )  # fmt: skip


def test_a_linear_ramp_takes_equal_steps():
    ramp = batch("linear", 4, 12)  # 4, 8, 12, 16
    assert [ramp.rows_at(step) for step in range(14)] == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 2


def test_doublings_are_equally_far_apart():
    ramp = batch("steps", 2, 9)  # 2, 4, 8, 16
    assert [ramp.rows_at(step) for step in range(11)] == [2] * 3 + [4] * 3 + [8] * 3 + [16] * 2


def test_the_learning_rate_follows_the_root_of_the_batch():
    ramp = batch("linear", 4, 12)
    assert batch_lr_scale(16, ramp) == 1
    assert batch_lr_scale(4, ramp) == pytest.approx(0.5)
    assert batch_lr_scale(4, ramp.model_copy(update={"lr_batch_exponent": 0.0})) == 1


@pytest.mark.parametrize(
    ("kind", "at_60", "at_84"),
    [("cosine", 0.55, None), ("linear", 0.55, 0.325), ("wsd", 1.0, 0.55)],
)
def test_ways_from_the_peak(kind, at_60, at_84):
    schedule = ScheduleSettings(
        lr_schedule=kind, warmup_iters=10, lr_decay_iters=110, min_lr=0.1, cooldown_iters=50
    )
    optimizer = OptimizerSettings(learning_rate=1.0)
    assert lr_at(10, optimizer, schedule) == pytest.approx(1.0)
    assert lr_at(60, optimizer, schedule) == pytest.approx(at_60)
    if at_84:
        assert lr_at(85, optimizer, schedule) == pytest.approx(at_84)
    assert lr_at(110, optimizer, schedule) == lr_at(10**6, optimizer, schedule) == 0.1


def test_a_cooldown_longer_than_there_is_room_for_begins_after_the_warmup():
    schedule = ScheduleSettings(
        lr_schedule="wsd", warmup_iters=10, lr_decay_iters=110, min_lr=0.0, cooldown_iters=500
    )
    optimizer = OptimizerSettings(learning_rate=1.0)
    found = [lr_at(step, optimizer, schedule) for step in (10, 35, 60, 110)]
    assert found == pytest.approx([1.0, 0.75, 0.5, 0.0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batch_schedule=linear", "--batch_ramp_iters=5"), "batch_start_rows=0 must divide"),
        (("--batch_schedule=noise", "--batch_start_rows=5"), "batch_start_rows=5 must divide"),
        (
            ("--batch_schedule=steps", "--batch_start_rows=4", "--batch_ramp_iters=5"),
            "4 times 2, 4, 8",
        ),
        (
            ("--batch_schedule=linear", "--batch_start_rows=4"),
            "set batch_ramp_iters, where it ends",
        ),
        (("--lr_schedule=wsd",), "set cooldown_iters, the length"),
    ],
)
def test_schedules_that_cannot_be_are_refused(corpus_dir, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        tiny_settings(corpus_dir, tmp_path, *flags)


def test_a_schedule_by_noise_needs_two_rows_a_worker(corpus_dir, tmp_path):
    """Fewer are one gradient, and nothing to hold it against: the batch would never grow."""
    settings = tiny_settings(corpus_dir, tmp_path, "--batch_schedule=noise", "--batch_start_rows=4")
    requirements.check_world(settings.batch, 2, None)
    with pytest.raises(
        UserError, match="3 workers need 6 rows to measure it; raise --batch_start_rows"
    ):
        requirements.check_world(settings.batch, 3, None)
    whole = tiny_settings(corpus_dir, tmp_path, "--batch_schedule=noise", "--batch_start_rows=12")
    requirements.check_world(whole.batch, 12, None)  # has nowhere to grow


def test_more_workers_may_go_on_with_a_batch_that_has_grown(root, corpus_dir):
    wider = (*RAMPS["linear"], "--max_iters=40", "--num_workers=8")
    runs.check(tiny_settings(corpus_dir, root / "linear", *wider))
    with pytest.raises(
        UserError, match="2 rows is too small for 8 workers; raise --batch_start_rows"
    ):
        runs.check(tiny_settings(corpus_dir, root / "another", *wider))


@pytest.fixture(scope="module")
def root(corpus_dir, tmp_path_factory):
    """Runs with each schedule, at once, and in two parts whose seam is on the way up."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in RAMPS.items():
        all_of_it, seam = f"--max_iters={LAST[name]}", "--max_iters=11"
        if name == "noise":
            seam = f"--max_iters={MEASURE_INTERVAL_STEPS * WARMUP_MEASUREMENTS + 5}"
        run_world(2, tiny_settings(corpus_dir, root / name, *flags, all_of_it))
        run_world(2, tiny_settings(corpus_dir, root / f"{name}-parts", *flags, seam))
        run_world(2, tiny_settings(corpus_dir, root / f"{name}-parts", *flags, all_of_it))
    run_world(1, tiny_settings(corpus_dir, root / "one", *RAMPS["linear"], "--max_iters=30"))
    return root


@pytest.mark.parametrize("name", RAMPS)
def test_resuming_in_the_middle_of_a_ramp_is_exact(root, name):
    assert losses(root / name) == losses(root / f"{name}-parts")
    last = LAST[name]
    assert weights(root / name, last) == weights(root / f"{name}-parts", last)


SIZES = {"linear": (2, 4, 6, 8, 10), "steps": (3, 6)}  # of RAMPS, on the way to 12 rows


def rows_before(step: int, name: str) -> int:
    """Return the rows of all steps before one: each size lasts equally long."""
    each = 20 // len(SIZES[name])
    ramp = (rows * min(max(step - each * i, 0), each) for i, rows in enumerate(SIZES[name]))
    return sum(ramp) + 12 * max(0, step - 20)


@pytest.mark.parametrize("name", ["linear", "steps"])
def test_tokens_seen_at_a_step_match_the_formula(root, name):
    settings = BatchSettings(
        batch_size=4, gradient_accumulation_steps=3, batch_schedule=name,
        batch_start_rows=2 if name == "linear" else 3, batch_ramp_iters=20,
    )  # fmt: skip
    for record in records(root / name, "train"):
        assert record["rows_seen"] == rows_before(record["step"], name)
        assert record["tokens_per_step"] == 16 * settings.rows_at(record["step"] - 1)
    state = checkpoints.newest(LocalStorage(root / name), lambda *_: None).state
    assert state.rows_seen == rows_before(30, name)


def test_a_ramp_is_the_same_on_any_world(root):
    two = losses(root / "linear")
    for step, loss in losses(root / "one").items():
        assert two[step] == pytest.approx(loss, rel=1e-5)


def test_the_noise_scale_makes_the_batch_grow(root):
    rows = [record["tokens_per_step"] // 16 for record in records(root / "noise", "train")]
    first = (
        MEASURE_INTERVAL_STEPS * (WARMUP_MEASUREMENTS - 1) + 1
    )  # steps with too few measurements
    assert rows == sorted(rows)
    assert set(rows[:first]) == {4}
    assert rows[-1] > 4
    state = checkpoints.newest(LocalStorage(root / "noise"), lambda *_: None).state
    growing = [step for step, count in enumerate(rows) if count < 12]
    grown = [r["text"] for r in records(root / "noise", "notice") if "noise scale" in r["text"]]
    assert grown
    assert grown[0].endswith(f"grows from 4 to {rows[first]}")
    assert state.batch["measured"] == sum(step % MEASURE_INTERVAL_STEPS == 0 for step in growing)


def test_the_noise_scale_of_gradients_that_are_known():
    """Gradients are drawn around G with a known covariance; the estimate finds trace / |G|^2."""
    generator = torch.Generator().manual_seed(1)
    mean, deviation = torch.full((50,), 0.1), 0.5  # |G|^2 = 0.5, trace = 12.5: 25 rows
    found = GlobalBatch.from_state(batch("noise", 8, 0, micro=8, times=16), {})
    for _ in range(400):
        rows = mean + deviation * torch.randn(found.rows, 50, generator=generator)
        part = found.rows // 2
        found.measure(part, float(rows[:part].mean(0).norm() ** 2), float(rows.mean(0).norm() ** 2))
    assert 16 <= found.rows <= 48
    assert 12 < found.noise_scale < 50


def test_a_measured_step_has_two_passes_on_every_rank():
    growing = GlobalBatch.from_state(batch("noise", 4, 0), {})
    assert growing.max_rows_per_micro_step(0, World()) == 2
    assert growing.max_rows_per_micro_step(1, World()) == 4
    assert growing.max_rows_per_micro_step(0, World(size=2)) == 1
    assert growing.max_rows_per_micro_step(0, World(size=3)) == 4  # too few rows to measure
