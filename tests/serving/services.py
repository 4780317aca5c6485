"""What the tests of the service share: runs that are written here, and the command as a process."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import httpx
from fastapi import FastAPI

from tests.checkpoints import files
from tests.conftest import REPOSITORY
from tests.inference.engines import ALPHABET, SHAPE, small_model
from yuzogpt import checkpoints, tokenization
from yuzogpt.config import ServeSettings, TrainSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.serving.app import build
from yuzogpt.tokenization.tokenizer import CharTokenizer


def write_checkpoint(run: Path, step: int, val_loss: float, seed: int = 1, **shape) -> Path:
    """Add a checkpoint to a run: of a small model, or of another shape."""
    model = small_model(seed, **shape)
    settings = TrainSettings.model_validate({"model": model.settings.model_dump()})
    metrics = {"val_loss_estimate": val_loss, "val_windows": 10}
    state = checkpoints.State(step, step, settings.model_dump(), "none", "none", metrics)
    tokenizer = tokenization.to_bytes(CharTokenizer(ALPHABET))
    return files.write_checkpoint(run, state, model.state_dict(), {}, tokenizer).directory


# Slow enough that a long request is seen to run: some milliseconds a token.
SLOW = {"n_layer": 8, "n_embd": 256, "n_head": 4, "block_size": 256}
assert SHAPE.vocab_size == 65


class Service:
    """A service that runs, and how to reach it."""

    def __init__(self, process: subprocess.Popen[str], url: str, printed: list[str]) -> None:
        """`printed`: grows while it runs."""
        self.process = process
        self.url = url
        self.printed = printed

    def post(self, **body) -> httpx.Response:
        """Ask for a completion."""
        body = {"model": "run", "prompt": "bead", "temperature": 0, **body}
        return httpx.post(f"{self.url}v1/completions", json=body, timeout=60)

    def model(self) -> dict:
        """Return what is served now."""
        return httpx.get(f"{self.url}v1/models").json()["data"][0]

    def gauge(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        text = httpx.get(f"{self.url}metrics").text
        found = re.findall(rf"^yuzogpt_{name}(?:{{.*?}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    def wait_until(self, is_so, seconds: float = 30) -> None:
        """Wait until a condition holds."""
        begin = time.monotonic()
        wait = threading.Event()
        while not is_so():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() - begin < seconds, f"not within {seconds} s"
            wait.wait(0.02)


YUZOGPT = (sys.executable, "-m", "yuzogpt")


@contextlib.contextmanager
def service(
    model: Path | str, *flags: str, command: Sequence[str] = YUZOGPT, **environment: str
) -> Iterator[Service]:
    """Run `yuzogpt serve` until the end of the block."""
    process = subprocess.Popen(
        [*command, "serve", str(model), "--port=0", "--device=cpu", *flags],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed: list[str] = []
    ready, url = threading.Event(), ""

    def read() -> None:
        nonlocal url
        for line in process.stdout:
            printed.append(line)
            if found := re.search(r"serving .* at (http://\S+)", line):
                url = found[1]
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(120)
        assert url, "".join(printed)
        yield Service(process, url, printed)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        reader.join(10)


def stream(service: Service, **body) -> Iterator[dict]:
    """Yield the events of a stream; the connection is closed where the reader stops."""
    body = {"model": "run", "prompt": "bead", "temperature": 0, "stream": True, **body}
    with httpx.stream("POST", f"{service.url}v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return
            if line:
                yield json.loads(line.removeprefix("data: "))


LOCAL = ("127.0.0.1", 40000)  # a client on this machine


@contextlib.asynccontextmanager
async def at_work(run: Path, *flags: str, key: str | None = None) -> AsyncIterator[FastAPI]:
    """Yield the app in this process, its model loaded."""
    where = [f"--model={run}", "--device=cpu", "--threads=1", "--num_replicas=0"]
    keys = [sha256(key.encode()).digest()] if key else []
    app = build(resolve(ServeSettings, [], [*where, *flags]), keys)
    async with app.router.lifespan_context(app):
        yield app


def client_of(app: FastAPI, root_path: str = "", peer=LOCAL) -> httpx.AsyncClient:
    """Return a client of an app in this process."""
    transport = httpx.ASGITransport(app, root_path=root_path, client=peer)
    return httpx.AsyncClient(transport=transport, base_url=f"http://localhost{root_path}")
