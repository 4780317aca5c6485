"""`yuzogpt sample`: from settings to printed samples.

In: the sampling settings. Out: samples, in order, each as soon as its batch is done.
"""

from collections.abc import Iterator
from pathlib import Path

from yuzogpt.config import SampleSettings
from yuzogpt.errors import UserError
from yuzogpt.references import resolve_model

SAMPLES_AT_ONCE = 16


def sample(settings: SampleSettings) -> Iterator[str]:
    """Yield prompt and continuation of each sample."""
    wanted = settings.sampling
    reference = resolve_model(wanted.out_dir if wanted.init_from == "resume" else wanted.init_from)
    tokenizer = reference.tokenizer()
    prompt = read_prompt(wanted.start)
    ids = tokenizer.encode(prompt).tolist()

    # Only now torch, which takes seconds to import: mistakes have shown by here.
    from yuzogpt.hardware import choose_hardware
    from yuzogpt.loading import load_model
    from yuzogpt.sampling.engine import generate
    from yuzogpt.world import World

    hardware = choose_hardware(settings.device, World())
    model = load_model(reference).to(hardware.device)
    seeds = range(wanted.seed, wanted.seed + wanted.num_samples)
    for first in range(0, len(seeds), SAMPLES_AT_ONCE):
        batch = seeds[first : first + SAMPLES_AT_ONCE]
        new_ids = generate(
            model,
            ids,
            batch,
            wanted.max_new_tokens,
            wanted.temperature,
            wanted.top_k,
            hardware,
        )
        for row in new_ids.tolist():
            yield prompt + tokenizer.decode(row)


def read_prompt(start: str) -> str:
    """Return the prompt itself, or the content of the file that FILE:path names."""
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:")).expanduser()
        try:
            start = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--start=FILE:{path}: not readable: {error}") from None
    if not start:
        raise UserError("--start: the prompt is empty; give at least one character")
    return start
