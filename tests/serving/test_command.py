"""`yuzogpt serve` as its user meets it: mistakes, a second one beside it, Ctrl-C."""

import signal
import socket
import sys

import httpx
import pytest
import torch

from tests.conftest import yuzogpt
from tests.serving.services import service, stream, write_checkpoint
from yuzogpt.config import ServeSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.serving.launch import announce, check


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("command") / "run"
    write_checkpoint(directory, 20, 2.0)
    return directory


@pytest.mark.slow
def test_mistakes_are_reported_before_anything_starts(run, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-a-key-that-is-long-enough\n")
    keys.chmod(0o644)
    short = tmp_path / "short"
    short.write_text("secret\n")
    short.chmod(0o600)
    latin = tmp_path / "latin"
    latin.write_bytes("sk-a-këy-that-is-long-enough\n".encode("latin-1"))
    latin.chmod(0o600)
    umlaut = tmp_path / "umlaut"
    umlaut.write_text("# ours\nsk-a-key-that-is-long-enough\nsk-a-këy-that-is-long-enough\n")
    umlaut.chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        mistakes = {
            (str(tmp_path / "nothing"),): "no model here",
            (str(run), "--host=0.0.0.0"): "anyone who can reach it could use it",
            (str(run), f"--api_keys_file={keys}"): f"others may read it; chmod 600 {keys}",
            (str(run), f"--api_keys_file={tmp_path / 'none'}"): "not readable",
            (str(run), f"--api_keys_file={short}"): "line 1: the key is shorter than 16",
            (str(run), f"--api_keys_file={umlaut}"): "line 3: the key has characters that are not",
            (str(run), "--allowed_origins=*"): "give --api_keys_file=FILE, or name the origins",
            (str(run), "--allowed_origins=http://a.example/"): "http://a.example/: write scheme",
            (str(run), f"--api_keys_file={latin}"): f"--api_keys_file={latin}: not UTF-8",
            (str(run / "checkpoints" / "step-20"), "--follow"): "not a run",
            (str(run), "--max_batch=0"): "greater than 0",
            (str(run), "--max_choices=50"): "there is room for 40",
            (str(run), f"--port={taken.getsockname()[1]}"): "--port=0 takes any port that is free",
            (str(run), "--max_bach=4"): "did you mean max_batch?",
            (str(run), str(run)): "one model at a time",
        }
        for arguments, message in mistakes.items():
            result = yuzogpt("serve", *arguments)
            assert result.returncode == 2, arguments
            assert message in result.stderr
            assert len(result.stderr.splitlines()) == 1
            assert "sk-a-k" not in result.stderr
            assert result.stdout == ""


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_address_has_brackets_where_a_port_follows(run, capsys, host):
    settings, _ = check(resolve(ServeSettings, [], [f"--model={run}", f"--host={host}"]))
    assert settings.http.host == "::1"  # what sockets take, and Serve
    announce(settings)
    assert capsys.readouterr().out == f"serving {run} at http://[::1]:8000/\n"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("replicas", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_mistakes_that_show_only_when_the_model_is_loaded(run, replicas, tmp_path):
    nothing = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for model, flag, message in (
        (str(run), "--device=cuda", "no "),
        ("gpt2", "--device=cpu", "gpt2: the weights are neither in Hugging Face's cache nor"),
    ):
        result = yuzogpt("serve", model, flag, f"--num_replicas={replicas}", "--port=0", **nothing)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert replicas or result.stderr.count("\n") == 1
        assert result.stdout in ("", "starting Ray ...\n")


BROKEN_AFTER_A_WHILE = """
from yuzogpt.cli import run
from yuzogpt.inference.engine import Engine

step, steps = Engine.step, iter(range(20))
def breaking(engine):
    if next(steps, None) is None:
        raise RuntimeError("the memory of the GPU is broken")
    return step(engine)
Engine.step = breaking
run()
"""


@pytest.mark.slow
def test_a_dead_engine_ends_the_server_and_says_why(run):
    command = [sys.executable, "-c", BROKEN_AFTER_A_WHILE]
    with service(run, "--num_replicas=0", "--threads=1", command=command) as served:
        *_, last = stream(served, max_tokens=100)
        assert last["error"]["message"] == "the engine failed (RuntimeError): see the log"
        assert served.process.wait(20) == 1
    printed = "".join(served.printed)
    assert "Traceback" in printed
    assert printed.endswith("yuzogpt: the engine failed: the memory of the GPU is broken\n")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_its_port_is_free_again(run, number, status):
    flags = ("--num_replicas=0", "--max_new_tokens=100000", "--threads=1")
    with service(run, *flags) as served:
        pieces = stream(served, max_tokens=300)
        assert next(pieces)
        served.process.send_signal(number)
        assert list(pieces)[-1]["choices"][0]["finish_reason"] == "length"  # what ran, ends
        assert served.process.wait(20) == status
        with pytest.raises(httpx.ConnectError):
            served.model()
        port = int(served.url.rstrip("/").rpartition(":")[2])
    assert not any("Traceback" in line for line in served.printed), served.printed
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_a_second_one_beside_it_says_what_would_work(run):
    with service(run, "--num_replicas=0", "--threads=1") as served:
        port = served.url.rstrip("/").rpartition(":")[2]
        result = yuzogpt("serve", str(run), "--num_replicas=0", f"--port={port}")
        assert result.returncode == 2
        assert "Address already in use" in result.stderr
        assert served.post(max_tokens=2).status_code == 200
