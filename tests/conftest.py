"""What the tests share: a small corpus made here, and the command line as a real process."""

import contextlib
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Two test processes share the cores: torch's threads of one would spin against the other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray learns this once a process, when it is imported; some tests do that, and others start a Ray.
os.environ["RAY_AUTH_MODE"] = "token"

from yuzogpt.config import CorpusSettings, ModelSettings, PrepareSettings, TrainSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.data.blocks import PreparedCorpus
from yuzogpt.data.preparation.prepare import LocalWorkers, prepare
from yuzogpt.storage import filesystems

REPOSITORY = Path(__file__).parents[1]

# A GPT that trains in milliseconds a step, in several DDP buckets, as flags.
TINY = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 "
    "--gradient_accumulation_steps=3 --learning_rate=1e-2 --warmup_iters=5 --lr_decay_iters=100 "
    "--eval_interval=50 --eval_iters=2 --device=cpu --dtype=float32 --threads=1 "
    "--ddp_bucket_mb=0.02"
).split()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the suite takes besides pytest's own options."""
    parser.addoption(
        "--crd",
        action="append",
        default=[],
        metavar="FILE",
        help="a custom resource definition of KubeRay, to hold cluster/kuberay against; repeatable",
    )
    parser.addoption(
        "--axe", metavar="FILE", help="axe.min.js of axe-core (npm), to hold the pages against"
    )


def make_text(characters: int, seed: int = 0) -> str:
    """Return text with structure that a model can learn: lines of words from a small lexicon."""
    generator = random.Random(seed)
    words = ["thou", "art", "the", "king", "of", "night", "and", "all", "that", "ends", "Well."]
    lines: list[str] = []
    length = 0
    while length < characters:
        lines.append(" ".join(generator.choice(words) for _ in range(8)) + "\n")
        length += len(lines[-1])
    return "".join(lines)[:characters]


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep the tests' downloads and remembered hashes apart from the user's."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    os.environ.pop("RAY_ADDRESS", None)
    return cache


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 20,000 characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(20_000))
    return path


def prepare_here(settings: CorpusSettings, directory: Path) -> tuple[PreparedCorpus, bool]:
    """Prepare a corpus in this process."""
    return prepare(PrepareSettings(corpus=settings), directory, LocalWorkers())


def prepare_char_corpus(source: Path, directory: Path) -> Path:
    """Prepare a character corpus from a file; return its directory."""
    settings = CorpusSettings(dataset="mine", source=str(source), tokenizer="char")
    prepare_here(settings, directory)
    return directory


@pytest.fixture(scope="session")
def corpus_dir(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared character corpus. Read only: tests that damage one make their own."""
    return prepare_char_corpus(text_file, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def gpt2_corpus_dir(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text in GPT-2's tokens. Read only."""
    directory = tmp_path_factory.mktemp("gpt2-corpus")
    settings = CorpusSettings(dataset="mine", source=str(text_file), tokenizer="gpt2")
    prepare_here(settings, directory)
    return directory


@pytest.fixture(scope="session")
def pretrained(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a GPT-2 of the corpus's vocabulary. Read only."""
    from yuzogpt.checkpoints import huggingface
    from yuzogpt.data.blocks import open_corpus
    from yuzogpt.model.gpt import GPT
    from yuzogpt.model.initialization import initialize

    vocab_size = open_corpus(corpus_dir).manifest.tokenizer["vocab_size"]
    shape = ModelSettings(n_layer=3, n_head=3, n_embd=48, block_size=32, vocab_size=vocab_size)
    model = GPT(shape)
    initialize(model, 3)
    folder = tmp_path_factory.mktemp("pretrained") / "hf"
    huggingface.save(model, folder, None)
    return folder


@contextlib.contextmanager
def aws_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a server of AWS's APIs that this process and its children find; it forgets at the end."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # What it stores is of the process: without this, a test would find what others left.
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield
    server.stop()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server of the test's own, which this process and its children find; yields a client."""
    import boto3

    with aws_server(monkeypatch):
        filesystems.store.cache_clear()
        yield boto3.client("s3")
        filesystems.store.cache_clear()


def names(s3: Any, prefix: str = "team/run/") -> set[str]:
    """Return the files below a folder of the bucket `runs`, without the marks of empty folders."""
    found = s3.list_objects_v2(Bucket="runs", Prefix=prefix).get("Contents", [])
    return {item["Key"].removeprefix(prefix) for item in found if not item["Key"].endswith("/")}


def tiny_settings(corpus: Path, out_dir: Path | str, *flags: str) -> TrainSettings:
    """Return the settings of a tiny run."""
    places = [f"--data_dir={corpus}", f"--out_dir={out_dir}"]
    return resolve(TrainSettings, [], [*TINY, *places, *flags])


def yuzogpt(
    *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "yuzogpt", *arguments],
        cwd=cwd or REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
