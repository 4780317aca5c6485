"""`yuzogpt sample`: settings -> samples, in order, each as soon as it and those before it are done.

With --interactive: an answer to each line of standard input, streamed.
"""

from collections.abc import Iterable, Iterator, Sequence
from io import TextIOBase
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from yuzogpt.checkpoints.resolve import ModelReference, resolve_model
from yuzogpt.config import (
    GenerationSettings,
    SampleSettings,
    SamplingDeviceSettings,
    SamplingSettings,
)
from yuzogpt.console.terminal import complain, say_while_waiting, shown_on
from yuzogpt.errors import UserError
from yuzogpt.inference.requests import Request, SamplingParams
from yuzogpt.storage.text import read_text
from yuzogpt.storage.untrusted import load_json
from yuzogpt.tokenization.tokenizer import Tokenizer, encode_prompt, start_of

if TYPE_CHECKING:
    from yuzogpt.inference.engine import Engine

MAX_SLOTS = 16  # samples decoded at a time


def sample(settings: SampleSettings) -> Iterator[str]:
    """Yield prompt and continuation of each sample: all of the first prompt, of the second, ..."""
    options = settings.sampling
    reference, tokenizer = resolve(options)
    prompts = read_prompts(options)
    encoded = [encode_start(prompt, tokenizer) for prompt in prompts]
    requests = [
        to_request(options, ids, options.seed + i)
        for ids in encoded
        for i in range(options.num_samples)
    ]
    engine = build_engine(settings.device, reference, tokenizer, len(requests))
    for index, text in enumerate(complete(engine, requests)):
        yield prompts[index // options.num_samples] + text


def converse(settings: SampleSettings, lines: Iterable[str], out: TextIO) -> None:
    """Continue each line as a prompt, one sample per line; write tokens as they come."""
    options = settings.sampling
    reference, tokenizer = resolve(options)
    engine = build_engine(settings.device, reference, tokenizer, 1)
    for index, line in enumerate(prompted(lines, out)):
        prompt = line.rstrip("\r\n")
        try:
            ids = encode_start(prompt, tokenizer) if prompt else []  # refused by the engine
            engine.submit(to_request(options, ids, options.seed + index))
        except UserError as error:
            complain(f"yuzogpt: {error}")
            continue
        out.write(shown_on(out, prompt))
        while engine.busy:
            out.write(shown_on(out, "".join(event.text for event in engine.step())))
            out.flush()
        out.write("\n---------------\n")
        out.flush()


def prompted(lines: Iterable[str], out: TextIO) -> Iterator[str]:
    """Yield the lines; if both ends are a terminal, with a prompt sign before each is read."""
    sign = "> " if out.isatty() and isinstance(lines, TextIOBase) and lines.isatty() else ""
    if sign:
        say_while_waiting("one prompt a line; Ctrl-D ends")
    remaining = iter(lines)
    while True:
        out.write(sign)
        out.flush()
        line = next(remaining, None)
        if line is None:
            out.write("\n" if sign else "")
            return
        yield line


def resolve(options: SamplingSettings) -> tuple[ModelReference, Tokenizer]:
    """Find the model and its tokenizer."""
    name = options.out_dir if options.init_from == "resume" else options.init_from
    reference = resolve_model(name, options.context)
    return reference, reference.tokenizer()


def build_engine(
    device: SamplingDeviceSettings,
    reference: ModelReference,
    tokenizer: Tokenizer,
    num_requests: int,
) -> "Engine":
    """Load the model into an engine with a slot for each request, up to MAX_SLOTS."""
    say_while_waiting(f"loading model {reference.name} ...")
    from yuzogpt.inference.load import load_engine

    slots = min(num_requests, MAX_SLOTS)
    return load_engine(reference, tokenizer, device, slots, compiled=device.compile)


def complete(engine: "Engine", requests: Sequence[Request]) -> Iterator[str]:
    """Yield the text of each request, in their order."""
    from yuzogpt.inference.completions import Completions

    return Completions(engine).complete(requests)


def to_request(options: GenerationSettings, prompt: Sequence[int], seed: int) -> Request:
    """Return the engine's request for one sample."""
    params = SamplingParams(
        repetition_penalty=options.repetition_penalty,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=seed,
    )
    return Request(
        prompt, options.max_new_tokens, params, options.stop, options.stop_at_end_of_text
    )


def encode_start(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Encode a prompt as nanoGPT's sample.py does; an empty one starts a document."""
    return encode_prompt(tokenizer, prompt) or [start_of(tokenizer)]


def read_prompts(options: SamplingSettings) -> list[str]:
    """Return the prompts in the file of --prompts, or else --start as the only one."""
    if not options.prompts:
        return [read_prompt(options.start)]
    path = Path(options.prompts).expanduser()
    lines = read_text(path, f"--prompts={path}").split("\n")  # U+2028 is text in JSON
    prompts = [read_line(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={path}: no prompt in it")
    return prompts


def read_line(line: str, origin: str) -> str:
    """Return the prompt of a JSON line: a string, or an object with the field `prompt`."""
    content = load_json(line, origin)
    prompt = content.get("prompt") if isinstance(content, dict) else content
    if not isinstance(prompt, str):
        raise UserError(f'{origin}: expected {{"prompt": "some text"}}')
    return prompt


def read_prompt(start: str) -> str:
    """Return --start itself, or the content of the file that FILE:path names."""
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:")).expanduser()
        start = read_text(path, f"--start=FILE:{path}")
    return start
