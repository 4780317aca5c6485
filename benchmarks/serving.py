"""Serving under load: latencies, goodput and refusals, from half to ten times the capacity.

    python benchmarks/serving.py DIR                # about 15 minutes
    python benchmarks/serving.py DIR --rounds 6 --loads 1 10 --dtype bfloat16

GPT-2's 124M shape, random weights, prompts of 32 tokens, 32 new tokens at temperature 0.8. The peer
is the engine alone, in a process without HTTP and Ray, with the same batch size.

1. Each prompt is completed on an idle service; all later answers must equal these texts.
2. Capacity: one client per slot, each sending its next request as soon as it has its answer.
3. In rounds, each load: streamed requests arrive by a Poisson process at that multiple of the
   capacity. The loads of a round follow each other in alternating order, because shared machines
   change their speed within minutes.

Goodput counts the complete answers that end while requests arrive, without a load's first ten
seconds. `--nice 19` gives the clients the lowest priority: on a machine of their own they would
take nothing from the service. Their measurements then include their own waiting.

DIR/run, a checkpoint of 0.5 GB, is written if it is missing.
"""

import argparse
import asyncio
import functools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import torch

from yuzogpt import checkpoints, tokenization
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.checkpoints.safetensors_file import write_tensors
from yuzogpt.config import ModelSettings, TrainSettings
from yuzogpt.inference.load import load_engine
from yuzogpt.inference.requests import Request, SamplingParams
from yuzogpt.model.gpt import GPT
from yuzogpt.model.initialization import initialize
from yuzogpt.storage.run_storage import LocalStorage

SHAPE = ModelSettings(vocab_size=50257, bias=True)
PROMPTS = 32
WARMUP_S = 10.0
PROMPT_TOKENS = NEW_TOKENS = 32
DATA, DONE, FAILED = b"data: ", b"data: [DONE]", b'data: {"error"'
JSON = {"Content-Type": "application/json"}


@dataclass
class Outcome:
    """The answer to one request, and its times."""

    number: int  # of its prompt
    status: int = 0
    seconds: float = 0.0
    ended: float = 0.0
    lines: list[bytes] = field(default_factory=list)  # of the stream; parsed after the measurement
    tokens: list[float] = field(default_factory=list)  # seconds from the request to each token

    @property
    def is_whole(self) -> bool:
        """Whether the answer is complete."""
        failed = any(line.startswith(FAILED) for line in self.lines)
        return self.status == 200 and self.lines[-1:] == [DONE] and not failed

    @property
    def text(self) -> str:
        """The generated text."""
        events = [json.loads(line.removeprefix(DATA)) for line in self.lines if line != DONE]
        return "".join(event["choices"][0]["text"] for event in events)


@dataclass
class Row:
    """The results of a load, over all rounds."""

    outcomes: list[Outcome] = field(default_factory=list)
    counted: int = 0  # complete answers
    seconds: float = 0.0  # in which they were counted

    def add(self, outcomes: Sequence[Outcome], began: float, seconds: float) -> None:
        """Add a round; count answers that ended between WARMUP_S and the last arrival."""
        begin, end = began + WARMUP_S, began + seconds
        self.outcomes += outcomes
        self.counted += sum(o.is_whole and begin < o.ended <= end for o in outcomes)
        self.seconds += end - begin

    @property
    def goodput(self) -> float:
        """Complete answers per second."""
        return self.counted / self.seconds


def make_run(directory: Path) -> Path:
    """Return a run whose checkpoint has random weights."""
    if not checkpoints.candidates(directory):
        model = GPT(SHAPE)
        initialize(model, 1)
        settings = TrainSettings.model_validate({"model": SHAPE.model_dump()}).model_dump()
        state = checkpoints.State(1, 1, settings, "none", "none", {})
        tokenizer = tokenization.to_bytes(tokenization.gpt2_tokenizer())
        weights, files = model.state_dict(), checkpoints.begin(LocalStorage(directory), state.step)
        name = checkpoints.tensor_file(checkpoints.MODEL, 0, 1)
        sha256 = write_tensors(files.local / name, weights, weights.values())
        checkpoints.commit(files, state, tokenizer, {name: sha256}, {name: list(weights)})
    return directory


def prompt(number: int) -> list[int]:
    """Return the ids of a prompt."""
    return random.Random(number).sample(range(50000), PROMPT_TOKENS)


@functools.cache
def body(number: int) -> bytes:
    """Return the body of a request."""
    request = {
        "model": "run", "prompt": prompt(number), "max_tokens": NEW_TOKENS, "seed": number,
        "temperature": 0.8, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    return json.dumps(request).encode()


def engine_alone(run: Path, options: argparse.Namespace) -> float:
    """Return the requests per second of the engine, in this process."""
    from yuzogpt.config import SamplingDeviceSettings

    reference = resolve_model(str(run))
    device = SamplingDeviceSettings(device="cpu", dtype=options.dtype)
    engine = load_engine(reference, reference.tokenizer(), device, options.batch)
    rates = list[float]()
    for _ in range(3):
        started = time.perf_counter()
        for number in range(2 * options.batch):
            sampling = SamplingParams(temperature=0.8, seed=number)
            engine.submit(Request(prompt(number), NEW_TOKENS, sampling, stop_at_end_of_text=False))
        with torch.inference_mode():
            while engine.busy:
                engine.step()
        rates.append(2 * options.batch / (time.perf_counter() - started))
    return statistics.median(rates)


@contextmanager
def service(run: Path, options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Run `yuzogpt serve`; yield its address and process."""
    command = [
        sys.executable, "-m", "yuzogpt", "serve", str(run), "--port=0", "--device=cpu",
        f"--dtype={options.dtype}", f"--max_batch={options.batch}",
        f"--max_waiting={options.waiting}", f"--max_choices={options.batch}",
        f"--num_replicas={options.replicas}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"serving .* at (http://\S+)", line):
                yield found[1], process.pid
                break
        else:
            raise SystemExit("the service did not start")
    finally:
        process.terminate()
        process.wait(60)


def memory(process: int) -> float:
    """Return the resident megabytes of the process that holds the model."""
    family = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    replicas = [one for one in family if "ServeReplica" in " ".join(one.cmdline())] or family[:1]
    resident: list[int] = [one.memory_info().rss for one in replicas]
    return max(resident) / 1e6


async def ask(client: aiohttp.ClientSession, url: str, number: int) -> Outcome:
    """Stream one completion."""
    started = time.perf_counter()
    outcome = Outcome(number)
    try:
        async with client.post(url, data=body(number), headers=JSON) as answer:
            async for line in answer.content:
                if answer.status != 200 or not line.startswith(DATA):
                    continue
                outcome.lines.append(line.rstrip())
                if outcome.lines[-1] != DONE:
                    outcome.tokens.append(time.perf_counter() - started)
            outcome.status = answer.status
    except (aiohttp.ClientError, TimeoutError) as error:
        print(f"!!! {error!r}", file=sys.stderr)
    outcome.ended = time.perf_counter()
    outcome.seconds = outcome.ended - started
    return outcome


async def closed_loop(client: aiohttp.ClientSession, url: str, clients: int, seconds: float) -> Row:
    """Return the results of clients that never pause."""
    started, outcomes, row = time.perf_counter(), list[Outcome](), Row()

    async def run_client(number: int) -> None:
        while time.perf_counter() < started + seconds:
            outcomes.append(await ask(client, url, number % PROMPTS))
            number += clients

    await asyncio.gather(*(run_client(number) for number in range(clients)))
    assert all(outcome.is_whole for outcome in outcomes)
    row.add(outcomes, started, seconds)
    return row


async def poisson(
    client: aiohttp.ClientSession, url: str, rate: float, seconds: float, seed: int, row: Row
) -> None:
    """Send requests that arrive at a rate, and add their outcomes to the row."""
    generator = random.Random(seed)
    asking: list[asyncio.Task[Outcome]] = []
    started = due = time.perf_counter()
    while (due := due + generator.expovariate(rate)) < started + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        asking.append(asyncio.create_task(ask(client, url, len(asking) % PROMPTS)))
    row.add(await asyncio.gather(*asking), started, seconds)


def spread(values: Sequence[float]) -> str:
    """Return mean, median and 99th percentile, in milliseconds."""
    if not values:
        return "-"
    ms = 1000 * np.array(values)
    return f"{ms.mean():.0f} / {np.median(ms):.0f} / {np.percentile(ms, 99):.0f}"


async def measure(url: str, process: int, alone: float, options: argparse.Namespace) -> None:
    """Print a table: a row for each load."""
    connections = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connections, timeout=timeout) as client:
        unloaded = [await ask(client, url, number) for number in range(PROMPTS)]
        assert all(one.is_whole for one in unloaded)
        capacity = (await closed_loop(client, url, options.batch, options.seconds)).goodput
        print(f"engine alone: {alone:.3f} requests/s")
        print(f"capacity of the service: {capacity:.3f} requests/s, {capacity / alone:.0%} of it")
        took = statistics.median(one.seconds for one in unloaded)
        print(f"unloaded, a request takes {took:.2f} s (median)\n", flush=True)
        rows = {load: Row() for load in options.loads}
        resident = dict[float, float]()
        try:
            for number in range(options.rounds):
                for load in options.loads if number % 2 == 0 else reversed(options.loads):
                    rate, seed = load * capacity, 100 * number + options.loads.index(load)
                    await poisson(client, url, rate, options.seconds, seed, rows[load])
                    resident[load] = memory(process)
        finally:  # also if it is interrupted
            measured = {load: row for load, row in rows.items() if load in resident}
            print_table(measured, [one.text for one in unloaded], resident)


def print_table(
    rows: Mapping[float, Row], expected: Sequence[str], resident: Mapping[float, float]
) -> None:
    """Print the table. `expected`: each prompt's text; `resident`: megabytes, after a load."""
    print(
        "| load | arrived | whole | goodput/s | of the peak | first token, ms: mean / median / "
        "p99 | a token, ms | refused | refusal, ms | equal to unloaded | resident MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    peak = max((row.goodput for row in rows.values()), default=0.0) or math.inf
    for load, row in rows.items():
        whole = [outcome for outcome in row.outcomes if outcome.is_whole]
        refused = [outcome.seconds for outcome in row.outcomes if outcome.status == 503]
        other = len(row.outcomes) - len(whole) - len(refused)
        gaps = [gap for outcome in whole for gap in np.diff(outcome.tokens)]
        same = sum(outcome.text == expected[outcome.number] for outcome in whole)
        print(
            f"| {load:g} | {len(row.outcomes)} | {len(whole)} | {row.goodput:.3f} "
            f"| {row.goodput / peak:.0%} | {spread([outcome.tokens[0] for outcome in whole])} "
            f"| {spread(gaps)} | {len(refused)}{f', {other} otherwise' if other else ''} "
            f"| {spread(refused)} | {same} of {len(whole)} | {resident[load]:.0f} |",
            flush=True,
        )


def main() -> None:
    """Measure the engine alone, then the service."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each load in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1, 2, 10])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--waiting", type=int, default=8)
    parser.add_argument("--nice", type=int, default=0, help="of the clients")
    parser.add_argument("--replicas", default="1", help="0: without Ray")
    options = parser.parse_args()
    if options.seconds <= WARMUP_S:
        parser.error(f"--seconds: more than the {WARMUP_S:g} that do not count")
    run = make_run(options.directory / "run")
    alone = engine_alone(run, options)
    with service(run, options) as (url, process):
        os.nice(options.nice)
        asyncio.run(measure(f"{url}v1/completions", process, alone, options))


if __name__ == "__main__":
    main()
