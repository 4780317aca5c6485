"""The command line as its user meets it: mistakes cost one line, exit 2, no files, no Ray."""

import os
import signal
import subprocess
import sys

import pytest
import yaml

from tests.conftest import REPOSITORY, TINY, prepare_char_corpus, yuzogpt
from tests.data.test_blocks import flip_a_byte
from tests.training.worlds import losses
from yuzogpt.cli import exit_status
from yuzogpt.config import SampleSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.inference.sample import sample as draw_samples

pytestmark = pytest.mark.slow

IMPORT = "import time:"  # begins the lines that PYTHONPROFILEIMPORTTIME asks for


@pytest.fixture(scope="module")
def run_dir(corpus_dir, tmp_path_factory):
    """A finished run. Read only."""
    out_dir = tmp_path_factory.mktemp("cli") / "run"
    places = [f"--data_dir={corpus_dir}", f"--out_dir={out_dir}"]
    result = yuzogpt("train", *TINY, *places, "--num_workers=0", "--max_iters=10")
    assert result.returncode == 0, result.stderr
    return out_dir


def tree(directory):
    """Return every file below a directory, with when it was changed."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.fixture
def damaged(text_file, tmp_path):
    directory = prepare_char_corpus(text_file, tmp_path / "damaged")
    flip_a_byte(directory / "train-00000.arrow")
    return directory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train shakespeare_char_cpu --n_layers=4", "did you mean n_layer?"),
        ("train shakespeare_char_cpu --n_layer=four", "--n_layer=four: "),
        ("train shakespear_char", "did you mean shakespeare_char?"),
        ("trian shakespeare_char", "did you mean train?"),
        ("train shakespeare_char_cpu --data_dir={tmp}/none", "no prepared corpus here"),
        ("train {tiny} --data_dir={damaged}", "train-00000.arrow: damaged"),
        ("train {tiny} --data_dir={corpus} --vocab_size=99", "leave vocab_size out"),
        ("train {tiny} --data_dir={corpus} --init_from=gpt2", "vocabulary has 50257 tokens"),
        ("train {tiny} --data_dir={corpus} --init_from={tmp}/none", "no model here"),
        ("train {tiny} --data_dir={corpus} --block_size=99999", "lower --block_size"),
        ("train {tiny} --data_dir={corpus} --out_dir={run} --n_layer=5", "model.n_layer: 2 -> 5"),
        ("train {tiny} --data_dir={corpus} --out_dir=hf://b/x", "hf:// is not supported"),
        ("train {tiny} --data_dir={corpus} --out_dir=s3://b", "a whole bucket; give a folder"),
        ("train {tiny} --data_dir={corpus} --out_dir=", "--out_dir=: empty"),
        ("train {tiny} --data_dir={corpus} --out_dir=/", "the root of this machine"),
        ("train {tiny} --data_dir={corpus} --wandb_key_file=~nobodyatall/k", "no such user"),
        ("train {tiny} --data_dir={corpus} --out_dir={text}", "is not a directory"),
        ("prepare a b", "one corpus at a time"),
        ("prepare mine --tokenizer=char --source={tmp}", "a directory, not a text file"),
        ("prepare mine --tokenizer=gpt2 --source={text} --data_dir={corpus}", "another tokenizer"),
        ("sample --out_dir={run} --start=ünï", "no id for 'ï' 'ü'"),
        ("sample --out_dir={run} --start=FILE:{tmp}/none", "not readable"),
        ("sample --out_dir={tmp}/none", "no model here"),
        ("sample --out_dir={run} --temperature=-1", "--temperature=-1: "),
        ("export {run} --to=huggingface {corpus}", "exists already"),
        ("export {run} --to=gguf {tmp}/out", "--to=gguf: "),
        ("export {run} {tmp}/a {tmp}/b", "one run, and one folder, at a time"),
        ("export {tmp}/none {tmp}/out", "no model here"),
        ("export {run} {text}/hf", "is not a directory; choose another"),
    ],
)
def test_mistakes(arguments, message, corpus_dir, damaged, run_dir, text_file, tmp_path):
    names = {
        "tiny": " ".join(TINY), "corpus": corpus_dir, "damaged": damaged, "run": run_dir,
        "text": text_file, "tmp": tmp_path,
    }  # fmt: skip
    before = tree(tmp_path) | tree(run_dir) | tree(corpus_dir)
    command = arguments.format(**names).split(" ")
    result = yuzogpt(*command, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    lines = result.stderr.strip().splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if IMPORT in line}
    assert "yuzogpt.cli" in imported
    assert "ray" not in imported  # before Ray starts, so at once
    (line,) = (line for line in lines if IMPORT not in line)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in line
    assert tree(tmp_path) | tree(run_dir) | tree(corpus_dir) == before


def test_head_ends_quietly():
    result = subprocess.run(
        f"{sys.executable} -m yuzogpt train --help | head -1",
        shell=True,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("yuzogpt train")
    assert result.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_no_mistake(closed):
    command = f"{sys.executable} -m yuzogpt --help {closed}"
    result = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, check=True)
    assert result.stderr == b""


def test_output_that_cannot_be_written_is_an_error():
    command = f"{sys.executable} -m yuzogpt --help > /dev/full"
    result = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, check=False)
    assert result.returncode != 0
    assert b"No space left on device" in result.stderr


def test_a_second_ctrl_c_ends_what_a_thread_holds_up():
    """A model that is loaded, say, in a thread that Python waits for."""
    program = """if True:
        import threading
        from yuzogpt.cli import entry_point

        def main(_):
            threading.Thread(target=threading.Event().wait).start()
            raise KeyboardInterrupt

        entry_point.main = main
        entry_point.run(["serve"])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "yuzogpt: interrupted\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (None, "")
    assert process.returncode == 130


def test_a_rank_in_the_environment_means_nothing_without_torchrun(tmp_path):
    """Job scripts of Kubeflow and SLURM leave it there."""
    left = {"RANK": "1", "LOCAL_RANK": "1"}
    result = yuzogpt("sample", f"--out_dir={tmp_path}/none", **left)
    assert (result.returncode, result.stderr.count("no model here")) == (2, 1)
    result = yuzogpt("train", "--data_dir=none", "--num_workers=0", **left, WORLD_SIZE="1")
    assert "no prepared corpus here" in result.stderr
    result = yuzogpt("train", "--num_workers=0", WORLD_SIZE="two")
    assert result.stderr == (
        "yuzogpt: WORLD_SIZE=two: in the environment, and not a number; unset WORLD_SIZE\n"
    )
    # All ranks of a node find the same mistake: one says it.
    rank = {**left, "WORLD_SIZE": "2"}
    assert yuzogpt("train", "--n_layers=4", **rank).stderr == ""
    assert "did you mean" in yuzogpt("train", "--n_layers=4", **{**rank, "LOCAL_RANK": "0"}).stderr


def test_submitted_jobs_refuse_relative_paths(corpus_dir, tmp_path):
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    places = [f"--data_dir={corpus_dir}", "--out_dir=run"]
    result = yuzogpt("train", *TINY, *places, cwd=tmp_path, **job)
    assert result.returncode == 2
    assert "--storage=" in result.stderr
    result = yuzogpt("train", *TINY, *places, "--storage=here", cwd=tmp_path, **job)
    assert "not absolute" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("train shakespeare_char --max_iters 100", "train shakespeare_char --max_iters=100"),
        ("train --max_iters 100 shakespeare_char", "train shakespeare_char --max_iters=100"),
        ("train --schedule.max_iters 7 --n_layer 2", "train --max_iters=7 --n_layer=2"),
        ("train --compile False --dry_run", "train --compile=False"),
        ("train --compile auto --bias true", "train --compile=auto --bias=true"),
        ("train --bias shakespeare_char", "train shakespeare_char --bias=True"),
        ("train --dry_run shakespeare_char", "train shakespeare_char"),
        ("sample --start -1 --temperature 0", "sample --start=-1 --temperature=0"),
        ("sample --interactive --stop a=b", "sample --interactive=True --stop=a=b"),
        ("sample --start --seed=1", "sample --start --seed=1"),
        ("evaluate --overwrite gpt2 --limit 3", "evaluate gpt2 --overwrite=True --limit=3"),
        ("evaluate --preset eval_gpt2", "evaluate eval_gpt2"),
        ("prepare --tokenizer char a --source a.txt", "prepare a --tokenizer=char --source=a.txt"),
        ("tune --search.dropout {choice:[0]}", "tune --search.dropout={choice:[0]}"),
    ],
)  # fmt: skip
def test_a_key_and_its_value_may_be_two_words(words, same, capfd):
    found = []
    for arguments in (words, same):
        status = exit_status([*arguments.split(" "), "--dry_run"])
        found.append((status, *capfd.readouterr()))
    assert found[0] == found[1]
    assert found[0][0] == (2 if "--start --seed" in words else 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --max_iter 100", "--max_iter=100: unknown setting; did you mean max_iters?"),
        ("train --n_layer four", "--n_layer=four: "),
        ("sample --tempature 0.5", "did you mean temperature?"),
        ("train 100", "100: no such preset"),
    ],
)
def test_a_mistake_in_two_words_is_named(words, message, capfd):
    assert exit_status(words.split(" ")) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("job", "flags", "said"),
    [
        ("train_gpt2", ["--max_iters", "9", "--dry_run"], "n_layer: 12\n"),
        ("train_gpt2", ["shakespeare_char_cpu", "--dry_run"], "n_layer: 4\n"),
        ("tune_finetune", ["--num_samples", "2", "--dry_run"], "init_from: gpt2"),
    ],
)
def test_a_job_has_a_preset_of_its_own(job, flags, said):
    result = subprocess.run(
        [sys.executable, f"jobs/{job}.py", *flags], cwd=REPOSITORY, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert said in result.stdout


def test_dry_run_prints_the_settings_and_does_nothing(tmp_path):
    result = yuzogpt("train", "shakespeare_char_cpu", "--n_layer=7", "--dry_run", cwd=tmp_path)
    assert result.returncode == 0
    assert "n_layer: 7" in result.stdout
    (tmp_path / "again.yaml").write_text(result.stdout)
    assert yuzogpt("train", "again.yaml", "--dry_run", cwd=tmp_path).stdout == result.stdout


def test_a_dry_run_is_wanted_or_not(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert exit_status(["train", "--dry_run=maybe"]) == 2
    assert capfd.readouterr().err == "yuzogpt: --dry_run=maybe: give true or false\n"
    assert exit_status(["train", "--dry_run=off"]) == 2  # for want of a corpus
    assert "no prepared corpus here" in capfd.readouterr().err


def test_dry_run_leaves_to_a_pretrained_model_what_it_will_give(tmp_path):
    flags = ["--init_from=gpt2-xl", "--dropout=0.1", "--block_size=512"]
    result = yuzogpt("train", *flags, "--dry_run", cwd=tmp_path)
    assert yaml.safe_load(result.stdout)["model"] == {"dropout": 0.1, "block_size": 512}
    (tmp_path / "again.yaml").write_text(result.stdout)
    assert yuzogpt("train", "again.yaml", "--dry_run", cwd=tmp_path).stdout == result.stdout


def test_help_shows_units_and_defaults():
    result = yuzogpt("train", "--help")
    assert "--block_size=1024" in result.stdout
    assert "[tokens]" in result.stdout
    assert "(auto | ddp | fsdp)" in result.stdout
    assert "  finetune_custom  " in result.stdout
    assert "prepare" in yuzogpt().stdout


def test_sampling_repeats_itself_and_depends_on_the_seed(run_dir, tmp_path):
    def sample(*flags):
        common = [f"--out_dir={run_dir}", "--num_samples=3", "--max_new_tokens=40", "--device=cpu"]
        return list(draw_samples(resolve(SampleSettings, [], [*common, *flags])))

    (tmp_path / "prompt.txt").write_text("thou art")
    first = sample("--start=thou art")
    assert first == sample(f"--start=FILE:{tmp_path / 'prompt.txt'}")
    assert all(text.startswith("thou art") and len(text) == 48 for text in first)
    assert len(set(first)) == 3
    # Sample i is drawn with seed + i, whatever else is in the batch.
    assert sample("--start=thou art", "--seed=1338", "--num_samples=2") == first[1:]
    greedy = sample("--start=thou art", "--temperature=0")
    assert len(set(greedy)) == 1
    assert sample("--start=thou art", "--top_k=1") == greedy


def test_samples_are_printed_apart(run_dir):
    flags = [f"--out_dir={run_dir}", "--num_samples=2", "--max_new_tokens=5", "--start=king"]
    result = yuzogpt("sample", *flags)
    assert result.returncode == 0, result.stderr
    assert [len(text) for text in result.stdout.split("\n---------------\n")] == [9, 9, 0]


def test_a_killed_run_resumes_and_ctrl_c_keeps_the_step_it_came_in(corpus_dir, tmp_path):
    flags = ["train", *TINY, f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}"]
    flags += ["--num_workers=0", "--eval_interval=10", "--max_iters=5000"]

    def interrupted_by(number):
        process = subprocess.Popen(
            [sys.executable, "-m", "yuzogpt", *flags],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if line.startswith("step") and "val_loss_estimate" in line and "step 0" not in line:
                break
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    assert interrupted_by(signal.SIGKILL)[0] == -signal.SIGKILL
    status, errors = interrupted_by(signal.SIGINT)
    assert status == 130
    steps = losses(tmp_path / "run")
    assert sorted(steps) == list(range(1, len(steps) + 1))
    kept = f"interrupted at step {len(steps)}: kept in {tmp_path / 'run'}"
    assert errors.strip() == f"yuzogpt: {kept}; the same command resumes it"
