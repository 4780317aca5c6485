"""`yuzogpt sample` as its user meets it."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY, TINY, yuzogpt
from tests.evaluation.models import random_model
from yuzogpt import tokenization
from yuzogpt.api import verbs
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.cli import main
from yuzogpt.config import SampleSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.errors import UserError
from yuzogpt.inference.load import load_engine
from yuzogpt.inference.requests import Request, SamplingParams
from yuzogpt.inference.sample import complete, encode_start, prompted, read_prompts
from yuzogpt.inference.sample import sample as draw_samples
from yuzogpt.storage.paths import SUBMITTED_JOB

SEPARATOR = "\n---------------\n"


@pytest.fixture(scope="module")
def run_dir(corpus_dir, tmp_path_factory):
    """A finished run. Read only."""
    out_dir = tmp_path_factory.mktemp("sample") / "run"
    paths = [f"--data_dir={corpus_dir}", f"--out_dir={out_dir}"]
    main(["train", *TINY, *paths, "--num_workers=0", "--max_iters=20"])
    return out_dir


def sample(run_dir, *flags):
    """Return what the command prints, without a process of its own."""
    flags = [f"--out_dir={run_dir}", "--max_new_tokens=60", *flags]
    return list(draw_samples(resolve(SampleSettings, [], flags)))


@pytest.mark.slow
def test_prompts_of_a_file_are_sampled_together_as_they_are_alone(run_dir, tmp_path):
    prompts = ["thou", "the king of", "a", "night and all that ends "]
    lines = [json.dumps({"prompt": prompts[0], "id": 7}), json.dumps(prompts[1]), ""]
    lines += [json.dumps({"prompt": prompt}) for prompt in prompts[2:]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    flags = ["--num_samples=5", "--top_p=0.95", "--repetition_penalty=1.1", "--min_p=0.01"]
    named = [f"--out_dir={run_dir}", f"--prompts={tmp_path / 'prompts.jsonl'}"]
    result = yuzogpt("sample", *named, *flags, "--max_new_tokens=60")
    assert result.returncode == 0, result.stderr
    samples = result.stdout.split(SEPARATOR)[:-1]
    assert len(samples) == 20  # more than there are slots
    assert all(text.startswith(prompts[i // 5]) for i, text in enumerate(samples))
    assert samples[5:10] == sample(run_dir, f"--start={prompts[1]}", *flags)
    assert samples[13:14] == sample(
        run_dir, f"--start={prompts[2]}", *flags, "--num_samples=1", "--seed=1340"
    )
    (whole,) = sample(run_dir, "--start=thou", "--num_samples=1", "--dtype=bfloat16")
    stop = whole[20:23]
    (cut,) = sample(
        run_dir, "--start=thou", "--num_samples=1", "--dtype=bfloat16",
        f"--stop={json.dumps(['zzz', stop])}",
    )  # fmt: skip
    assert cut == "thou" + whole[4 : whole.index(stop, 4)]


def test_a_line_of_prompts_ends_where_json_lines_end(tmp_path):
    prompts = ["one\u2028two", "three\u2029four", "five\x85six"]
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("\r\n".join(lines).encode())
    assert read_prompts(resolve(SampleSettings, [], [f"--prompts={path}"]).sampling) == prompts


def test_end_of_text_in_a_prompt_is_the_token():
    gpt2, end = tokenization.gpt2_tokenizer(), 50256
    for prompt, ids in {
        "<|endoftext|>": [end],
        "": [end],
        "<|endoftext|>The king": [end, *gpt2.encode("The king")],
        "a<|endoftext|><|endoftext|>b": [*gpt2.encode("a"), end, end, *gpt2.encode("b")],
        "<|endoftext": [*gpt2.encode("<|endoftext")],
    }.items():
        assert encode_start(prompt, gpt2) == ids
    characters = tokenization.CharTokenizer.from_text("\n<|endoftxt>")
    assert encode_start("", characters) == [0]  # a line's end, as nanoGPT's --start
    assert characters.decode(encode_start("<|endoftext|>", characters)) == "<|endoftext|>"


def test_every_way_to_start_a_document_is_the_same(tmp_path):
    run = random_model(tmp_path / "run")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": ""}\n"<|endoftext|>"\n')
    flags = [f"--out_dir={run}", "--num_samples=1", "--max_new_tokens=20", "--device=cpu"]
    engine = load_engine(
        resolve_model(str(run)), tokenization.gpt2_tokenizer(), SampleSettings().device, 1
    )
    (text,) = complete(engine, [Request([50256], 20, SamplingParams(temperature=0.8, seed=1337))])
    assert sample(run, *flags, "--start=", "--top_k=0") == [text]
    assert sample(run, *flags, f"--prompts={tmp_path / 'prompts.jsonl'}", "--top_k=0") == [
        text, f"<|endoftext|>{text}",
    ]  # fmt: skip


def test_a_prompt_file_is_read_without_its_mark_of_unicode(tmp_path):
    path = tmp_path / "prompt"
    path.write_text('\ufeff"king"', encoding="utf-8")
    for flag, text in (f"--start=FILE:{path}", '"king"'), (f"--prompts={path}", "king"):
        assert read_prompts(resolve(SampleSettings, [], [flag]).sampling) == [text]


SHORT = ["--num_samples=1", "--max_new_tokens=5"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Be a submitted job, whose directory has nothing of what is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SUBMITTED_JOB, "{}")


@pytest.mark.usefixtures("elsewhere")
def test_relative_paths_of_a_submitted_job_start_at_storage(run_dir, capsys):
    storage = run_dir.parent
    (storage / "prompts.jsonl").write_text('"thou art"')
    (storage / "prompt.txt").write_text("the king")
    for flags, prompt in (
        (["--out_dir=run", "--prompts=prompts.jsonl"], "thou art"),
        (["--init_from=run", "--start=FILE:prompt.txt"], "the king"),
    ):
        main(["sample", f"--storage={storage}", *flags, *SHORT])
        assert capsys.readouterr().out.startswith(prompt)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "flag",
    ["--out_dir=run", "--init_from=run", "--prompts=prompts.jsonl", "--start=FILE:prompt.txt"],
)
def test_a_submitted_job_says_which_relative_path_it_would_lose(run_dir, flag):
    with pytest.raises(UserError, match=r"relative, and a submitted job's .*--storage="):
        main(["sample", f"--out_dir={run_dir}", flag])


@pytest.mark.usefixtures("elsewhere")
def test_a_submitted_job_names_no_run_that_it_does_not_read(run_dir, capsys):
    main(["sample", f"--init_from={run_dir}", "--start=thou", *SHORT])
    assert capsys.readouterr().out.startswith("thou")
    published = resolve(SampleSettings, [], ["--init_from=gpt2"])
    assert verbs.with_sampling_paths(published) == published


def test_a_context_that_no_memory_holds_is_one_line(corpus_dir, tmp_path):
    flags = [*TINY, f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}"]
    main(["train", *flags, "--num_workers=0", "--max_iters=1", "--pos_emb=rotary"])
    assert sample(tmp_path / "run", "--context=64")
    with pytest.raises(UserError, match=r"--context=9{12}: keys .* GB, and there are .* lower it"):
        sample(tmp_path / "run", f"--context={'9' * 12}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is chosen")
@pytest.mark.parametrize("flags", [["--device=cpu"], []])
def test_a_cpu_says_that_it_does_not_compile(run_dir, flags):
    assert sample(run_dir, "--num_samples=1", "--compile=False")
    with pytest.raises(UserError, match=r"^--compile=True: .* not on cpu; leave it out$"):
        sample(run_dir, "--compile=True", *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"a"\n{"text": "a"}', "prompts.jsonl:2: expected "),
        ('"a"\n\n{', "prompts.jsonl:3: not JSON"),
        ("[" * 100_000, "prompts.jsonl:1: nested too deeply"),
        ("\n", "no prompt in it"),
        (None, "not readable"),
        ('"ü"', "no id for 'ü'"),
    ],
)
def test_broken_prompt_files(run_dir, tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    result = yuzogpt("sample", f"--out_dir={run_dir}", f"--prompts={path}")
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--top_p=0", "--min_p=2", "--repetition_penalty=0", "--stop=[1"])
def test_settings_that_make_no_sense(run_dir, flag):
    result = yuzogpt("sample", f"--out_dir={run_dir}", flag)
    assert (result.returncode, result.stdout) == (2, "")
    assert flag in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_prompt_sign_stands_on_a_terminal_alone():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for kind, shown in ((Terminal, "> > > \n"), (io.StringIO, "")):
        out = kind()
        assert list(prompted(kind("one\ntwo\n"), out)) == ["one\n", "two\n"]
        assert out.getvalue() == shown


def interactive(run_dir, *flags):
    """Start a conversation."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "yuzogpt",
            "sample",
            f"--out_dir={run_dir}",
            "--interactive",
            *flags,
        ],
        # As most locales have it: Python reads C.UTF-8's input leniently.
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONIOENCODING": "utf-8:strict",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_interactive_answers_each_line_until_the_input_ends(run_dir):
    process = interactive(run_dir, "--max_new_tokens=60")
    lines = "thou art\nünknown\n\n".encode() + b"th\xffe\nthe king\n"
    out, errors = process.communicate(lines, timeout=60)
    assert process.returncode == 0
    messages = errors.decode().splitlines()
    assert len(messages) == 3
    assert "no id for 'w' 'ü'" in messages[0]
    assert "empty" in messages[1]
    assert "no id for '\\udcff'" in messages[2]  # a byte that is no UTF-8
    first, second = out.decode().split(SEPARATOR)[:-1]
    assert [first] == sample(run_dir, "--start=thou art", "--num_samples=1")
    assert [second] == sample(run_dir, "--start=the king", "--num_samples=1", "--seed=1341")


@pytest.mark.slow
def test_interactive_streams_and_ends_quietly_at_ctrl_c(run_dir):
    process = interactive(run_dir, "--max_new_tokens=1000000")
    process.stdin.write(b"thou\n")
    process.stdin.flush()
    assert len(process.stdout.read(500)) == 500  # long before the end
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, b"")
    assert len(out) < 900_000
