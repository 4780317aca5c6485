"""`yuzogpt sample`: from settings to printed samples.

In: the sampling settings. Out: samples, in order, each as soon as it and those before it are done;
or, with --interactive, an answer to each line of the standard input, as it comes.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from yuzogpt.checkpoints.resolve import ModelReference, resolve_model
from yuzogpt.config import SampleSettings, SamplingSettings
from yuzogpt.console.terminal import complain, shown_on
from yuzogpt.errors import UserError
from yuzogpt.inference.requests import Request, Sampling
from yuzogpt.storage.text import read_text
from yuzogpt.storage.untrusted import load_json
from yuzogpt.tokenization.tokenizer import Tokenizer, encode_prompt, start_of

if TYPE_CHECKING:
    from yuzogpt.inference.engine import Engine

SAMPLES_AT_ONCE = 16


def sample(settings: SampleSettings) -> Iterator[str]:
    """Yield prompt and continuation of each sample: all of the first prompt, of the second, ..."""
    wanted = settings.sampling
    reference, tokenizer = resolve(wanted)
    prompts = read_prompts(wanted)
    encoded = [ids_of(prompt, tokenizer) for prompt in prompts]
    requests = [
        to_request(wanted, ids, wanted.seed + i)
        for ids in encoded
        for i in range(wanted.num_samples)
    ]
    engine = build_engine(settings, reference, tokenizer, len(requests))
    for number, text in enumerate(complete(engine, requests)):
        yield prompts[number // wanted.num_samples] + text


def converse(settings: SampleSettings, lines: Iterable[str], out: TextIO) -> None:
    """Go on with each line as a prompt, one sample a line, written as it comes."""
    wanted = settings.sampling
    reference, tokenizer = resolve(wanted)
    engine = build_engine(settings, reference, tokenizer, 1)
    for number, line in enumerate(lines):
        prompt = line.rstrip("\r\n")
        try:
            ids = ids_of(prompt, tokenizer) if prompt else []  # which is refused
            engine.submit(to_request(wanted, ids, wanted.seed + number))
        except UserError as error:
            complain(f"yuzogpt: {error}")
            continue
        out.write(shown_on(out, prompt))
        while engine.busy:
            out.write(shown_on(out, "".join(event.text for event in engine.step())))
            out.flush()
        out.write("\n---------------\n")
        out.flush()


def resolve(wanted: SamplingSettings) -> tuple[ModelReference, Tokenizer]:
    """Find the model, and the tokenizer that it speaks."""
    name = wanted.out_dir if wanted.init_from == "resume" else wanted.init_from
    reference = resolve_model(name, wanted.context)
    return reference, reference.tokenizer()


def build_engine(
    settings: SampleSettings, reference: ModelReference, tokenizer: Tokenizer, requests: int
) -> "Engine":
    """Load the model into an engine with room for so many requests, within reason."""
    from yuzogpt.inference.load import load_engine

    slots = min(requests, SAMPLES_AT_ONCE)
    return load_engine(
        reference, tokenizer, settings.device, slots, compiled=settings.device.compile
    )


def complete(engine: "Engine", requests: Sequence[Request]) -> Iterator[str]:
    """Yield the text of each request, in their order."""
    ids = [engine.submit(request) for request in requests]
    texts, finished = dict.fromkeys(ids, ""), set()
    for number in ids:
        while number not in finished:
            for event in engine.step():
                texts[event.request] += event.text
                if event.finish:
                    finished.add(event.request)
        yield texts.pop(number)


def to_request(wanted: SamplingSettings, prompt: Sequence[int], seed: int) -> Request:
    """Return what the settings ask the engine for."""
    sampling = Sampling(
        repetition_penalty=wanted.repetition_penalty,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        min_p=wanted.min_p,
        seed=seed,
    )
    return Request(prompt, wanted.max_new_tokens, sampling, wanted.stop, wanted.stop_at_end_of_text)


def ids_of(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt as nanoGPT's sample.py does; an empty one begins a document."""
    return encode_prompt(tokenizer, prompt) or [start_of(tokenizer)]


def read_prompts(wanted: SamplingSettings) -> list[str]:
    """Return the prompts: those of --prompts, or --start alone."""
    if not wanted.prompts:
        return [read_prompt(wanted.start)]
    path = Path(wanted.prompts).expanduser()
    lines = read_text(path, f"--prompts={path}").split("\n")  # U+2028 is text in JSON
    prompts = [read_line(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={path}: no prompt in it")
    return prompts


def read_line(line: str, place: str) -> str:
    """Return the prompt of a JSON line: a string, or an object with one named `prompt`."""
    content = load_json(line, place)
    prompt = content.get("prompt") if isinstance(content, dict) else content
    if not isinstance(prompt, str):
        raise UserError(f'{place}: expected {{"prompt": "some text"}}')
    return prompt


def read_prompt(start: str) -> str:
    """Return the prompt itself, or the content of the file that FILE:path names."""
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:")).expanduser()
        start = read_text(path, f"--start=FILE:{path}")
    return start
