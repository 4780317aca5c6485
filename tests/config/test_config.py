"""Settings: one schema, precedence, bare and dotted keys, errors in one line."""

import pytest
import yaml

from yuzogpt.config import (
    EvaluateSettings,
    ExportSettings,
    PrepareSettings,
    SampleSettings,
    TrainSettings,
    with_changes,
)
from yuzogpt.config.resolve import changed_frozen, leaves, preset_names, resolve, to_yaml
from yuzogpt.errors import UserError

BRIEF_CPU = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0"
).split()


@pytest.mark.parametrize("schema", [TrainSettings, PrepareSettings, SampleSettings, ExportSettings])
def test_leaf_names_are_unique_and_documented(schema):
    names = [dotted.split(".")[1] for dotted, _ in leaves(schema)]
    assert len(names) == len(set(names))
    assert all(field.description for _, field in leaves(schema))


def test_flags_of_the_brief_work_as_written():
    settings = resolve(TrainSettings, ["shakespeare_char"], BRIEF_CPU)
    assert (settings.model.n_layer, settings.model.block_size, settings.model.dropout) == (4, 64, 0)
    assert (settings.device.device, settings.device.compile) == ("cpu", False)
    assert (settings.schedule.max_iters, settings.schedule.lr_decay_iters) == (2000, 2000)
    assert (settings.evaluation.eval_iters, settings.log.log_interval) == (20, 1)
    assert settings.run.out_dir == "out-shakespeare-char"
    sampled = resolve(
        SampleSettings,
        [],
        ["--init_from=gpt2-xl", "--start=What?", "--num_samples=5", "--max_new_tokens=100"],
    )
    assert (sampled.sampling.init_from, sampled.sampling.num_samples) == ("gpt2-xl", 5)


TEXTS = [
    *("1", "0", "12", "012", "0o17", "0x10", "0b1", "1_000", "+3", "-1", "1e3", "4.0", "1.5"),
    *("1e-3", "1E-3", ".5", "5.", "1_000.5", ".inf", ".nan", "nan", "190:20:30", "2026-01-01"),
    *("yes", "no", "on", "off", "y", "n", "true", "True", "TRUE", "false", "None", "null", "~"),
    *("auto", "cosine", "gpt2", "=", "a b", "", "99999999999999999999999", "1..4"),
]
KEYS = ("n_layer", "seed", "dropout", "learning_rate", "compile", "decay_lr", "dataset", "out_dir")
KEYS += ("num_workers", "lr_schedule", "eval_tasks", "max_preemptions")


def outcome(files, flags):
    """What a command would have: its settings, or that it is refused."""
    try:
        return resolve(TrainSettings, files, flags)
    except UserError:
        return "refused"


@pytest.mark.parametrize("key", KEYS)
def test_a_text_means_the_same_in_yaml_and_as_a_flag(key, tmp_path):
    path = tmp_path / "x.yaml"
    found = set()
    for text in TEXTS:
        path.write_text(f"{key}: {text}\n")
        as_flag = outcome([], [f"--{key}={text}"])
        assert outcome([str(path)], []) == as_flag, text
        found.add(str(as_flag))
    assert len(found) > 1  # not all are refused


@pytest.mark.parametrize(
    ("line", "section", "leaf", "value"),
    [
        ("warmup_iters: 012", "schedule", "warmup_iters", 12),
        ("max_iters: 1_000", "schedule", "max_iters", 1000),
        ("learning_rate: 1e-3", "optimizer", "learning_rate", 0.001),
        ("compile: yes", "device", "compile", True),
        ("decay_lr: no", "schedule", "decay_lr", False),
        ("out_dir: 012", "run", "out_dir", "012"),
        ("out_dir: no", "run", "out_dir", "no"),
        ("eval_tasks: [lambada, wikitext2]", "evaluation", "eval_tasks", ("lambada", "wikitext2")),
        ("a: &a {n_layer: 3}\nmodel: {<<: *a}", "model", "n_layer", 3),
    ],
)
def test_what_yaml_means(line, section, leaf, value, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(line.replace("a: &a", "model: &a"))
    found = getattr(getattr(resolve(TrainSettings, [str(path)], []), section), leaf)
    assert (found, type(found)) == (value, type(value))


def test_an_empty_section_is_empty(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model:\nschedule: {}\noptimizer: # nothing yet\ndata_dir:\n")
    assert resolve(TrainSettings, [str(path)], []) == TrainSettings()
    path.write_text("modle:\n")
    with pytest.raises(UserError, match="unknown setting"):
        resolve(TrainSettings, [str(path)], [])
    with pytest.raises(UserError, match="unknown setting"):
        resolve(TrainSettings, [], ["--model="])


def test_yaml_that_is_nested_too_deeply_is_one_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("[" * 5000)
    with pytest.raises(UserError, match="not readable as YAML: nested too deeply"):
        resolve(TrainSettings, [str(path)], [])


def test_later_wins(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {n_layer: 3, n_head: 3}\nn_embd: 96\n")
    second.write_text("model.n_layer: 5\n")
    settings = resolve(TrainSettings, [str(first), str(second)], ["--model.n_embd=192"])
    assert (settings.model.n_layer, settings.model.n_head, settings.model.n_embd) == (5, 3, 192)
    assert settings.model.block_size == 1024  # the default


def test_an_integer_is_a_learning_rate():
    assert resolve(TrainSettings, [], ["--learning_rate=1"]).optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_layers=4"], "did you mean n_layer?"),
        (["--n-layer=4"], "did you mean n_layer?"),
        (["--modle.n_layer=4"], "did you mean model.n_layer?"),
        (["--n_layer=four"], "--n_layer=four: "),
        (["--n_layer=0"], "greater than 0 (default: 12)"),
        (["--dropout=1.5"], "less than 1 (default: 0.0)"),
        (["--learning_rate=nan"], "finite number"),
        (["--n_embd=100", "--n_head=3"], "n_embd=100 is not a multiple of n_head=3"),
        (["--device=gpu"], "'cpu', 'cuda' or 'mps'"),
        (["--compile=maybe"], "--compile=maybe: "),
        (["--n_layer"], "--n_layer: needs a value: --n_layer=VALUE"),
        (["--dataset=../x"], "should match pattern"),
        (["--seed=99999999999999999999999"], "--seed=9999"),
        (["-x"], "not a flag; write --key=value"),
    ],
)
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError) as error:
        resolve(TrainSettings, [], flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_or_broken_yaml(tmp_path):
    with pytest.raises(UserError, match="did you mean gpt2_124m"):
        resolve(TrainSettings, ["gpt2_124"], [])
    path = tmp_path / "x.yaml"
    path.write_text("a: [1")
    with pytest.raises(UserError, match="not readable as YAML"):
        resolve(TrainSettings, [str(path)], [])
    path.write_text("- 1")
    with pytest.raises(UserError, match="found a list"):
        resolve(TrainSettings, [str(path)], [])
    path.write_text("model: {n_layer: x}")
    with pytest.raises(UserError, match=r"x.yaml: model.n_layer: x: "):
        resolve(TrainSettings, [str(path)], [])


@pytest.mark.parametrize("name", preset_names())
def test_presets_resolve_and_survive_yaml(name, tmp_path):
    schema = EvaluateSettings if name.startswith("eval_") else TrainSettings
    settings = resolve(schema, [name], [])
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(settings))
    assert resolve(schema, [str(path)], []) == settings


@pytest.mark.parametrize("size", ["124m", "350m", "774m", "1558m"])
def test_gpt2_presets_have_the_arithmetic_that_they_show(size):
    settings = resolve(TrainSettings, [f"gpt2_{size}"], [])
    assert settings.batch.global_rows * settings.model.block_size == 491_520


def test_finetuning_on_shakespeare_is_nanogpts():
    settings = resolve(TrainSettings, ["finetune_shakespeare"], [])
    assert (settings.run.init_from, settings.data.dataset) == ("gpt2-xl", "shakespeare")
    assert (settings.batch.batch_size, settings.batch.gradient_accumulation_steps) == (1, 32)
    assert (settings.optimizer.learning_rate, settings.schedule.decay_lr) == (3e-5, False)
    assert settings.schedule.max_iters == 20
    assert (settings.evaluation.eval_interval, settings.evaluation.eval_iters) == (5, 40)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("finetune")])
def test_finetuning_leaves_the_shape_to_the_pretrained_model(name):
    settings = resolve(TrainSettings, [name], [])
    assert settings.run.init_from != "scratch"
    assert settings.model.model_fields_set <= {"block_size", "dropout"}


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("out_dir: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        resolve(TrainSettings, [str(path)], [])
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(path.read_text())


def test_changed_frozen_names_what_differs():
    old = resolve(TrainSettings, [], [])
    new = resolve(TrainSettings, [], ["--seed=1", "--max_iters=5", "--log_interval=7"])
    assert changed_frozen(old.model_dump(), new) == ["run.seed: 1337 -> 1"]


def test_with_changes_counts_as_model_copy_does():
    settings = resolve(TrainSettings, [], ["--n_layer=3"])
    changed = with_changes(settings, {"run.out_dir": "x", "run.seed": 7, "data.data_dir": "y"})
    assert (changed.run.out_dir, changed.run.seed, changed.data.data_dir) == ("x", 7, "y")
    run = settings.run.model_copy(update={"out_dir": "x", "seed": 7})
    data = settings.data.model_copy(update={"data_dir": "y"})
    copied = settings.model_copy(update={"run": run, "data": data})
    assert changed == copied
    assert changed.model_fields_set == copied.model_fields_set == {"model", "run", "data"}
    assert changed.run.model_fields_set == {"out_dir", "seed"}
    assert changed.model is settings.model
    assert settings.run.out_dir == "out"
    with pytest.raises(AssertionError, match=r"run\.outdir"):
        with_changes(settings, {"run.outdir": "x"})
