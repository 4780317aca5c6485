"""Every value of every choice that decides what a run computes is trained, and no two are the same.

A name whose implementation is another's, or that a branch forgets, would train something else in
silence.
"""

import pytest

from tests.conftest import tiny_settings
from tests.training.worlds import records
from yuzogpt import runs
from yuzogpt.config import TrainSettings
from yuzogpt.config.registry import values_of
from yuzogpt.config.resolve import leaves
from yuzogpt.model.layers import ACTIVATIONS, gelu
from yuzogpt.training.launch import work_here

pytestmark = pytest.mark.slow

CHOICES = {
    dotted: (field.default, values_of(field))
    for dotted, field in leaves(TrainSettings)
    if field.json_schema_extra["frozen"] and values_of(field)
}
# Enough for schedules to begin, to grow and to end; the other values need none of these.
FLAGS = (
    "--gradient_accumulation_steps=4 --batch_start_rows=2 --batch_ramp_iters=5 --warmup_iters=1 "
    "--lr_decay_iters=8 --cooldown_iters=3 --max_iters=8 --eval_interval=8 --eval_iters=1 "
    "--n_layer=1 --block_size=8 --num_workers=0"
).split()


@pytest.fixture(scope="module")
def computed(corpus_dir, tmp_path_factory):
    """A function that trains with more flags and returns what it computed."""
    known = {}

    def compute(*flags):
        if flags not in known:
            out_dir = tmp_path_factory.mktemp("choice") / "run"
            run = runs.check(tiny_settings(corpus_dir, out_dir, *FLAGS, *flags))
            with run.hold():
                work_here(run.settings, run.storage, None)
            train = [(r["loss"], r["lr"], r["rows_seen"]) for r in records(out_dir, "train")]
            known[flags] = (*train, records(out_dir, "final")[0]["val_loss"])
        return known[flags]

    return compute


@pytest.mark.parametrize("dotted", CHOICES)
def test_each_value_of_a_choice_computes_something_of_its_own(computed, dotted):
    default, values = CHOICES[dotted]
    found = {
        value: computed(*([] if value == default else [f"--{dotted}={value}"])) for value in values
    }
    same = [(a, b) for a in found for b in found if a < b and found[a] == found[b]]
    assert same == []


def test_an_alias_is_found(computed, monkeypatch):
    for table in ("entries", "_implementations"):
        monkeypatch.setattr(ACTIVATIONS, table, dict(getattr(ACTIVATIONS, table)))
    ACTIVATIONS.register("alias", help="gelu by another name")(gelu)
    assert computed("--activation=alias") == computed()
