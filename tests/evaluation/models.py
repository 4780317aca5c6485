"""What the tests of evaluation share: a random GPT-2, and small benchmarks of their own."""

import json
import random
from pathlib import Path

from tests.sampling.engines import small_model
from yuzogpt import checkpoints, tokenizers
from yuzogpt.config import TrainSettings
from yuzogpt.export import to_huggingface
from yuzogpt.references import resolve_model

WORDS = (
    "the king of night and all that ends well thou art not what I would call a friend said she to "
    "him as they went down into the old garden where nobody had been since summer came"
).split()


def random_model(run: Path, seed: int = 1, **shape: int) -> Path:
    """Write a run whose model speaks GPT-2's tokens; return it."""
    model = small_model(seed, **{"vocab_size": 50257, "block_size": 64, **shape})
    settings = TrainSettings.model_validate({"model": model.settings.model_dump()})
    state = checkpoints.State(20, 20, settings.model_dump(), "none", "none", {})
    tokenizer = tokenizers.to_bytes(tokenizers.gpt2_tokenizer())
    checkpoints.write(run, state, model.state_dict(), {}, tokenizer)
    return run


def exported(run: Path) -> Path:
    """Export a run as a Hugging Face folder; return that."""
    folder = run.with_name("hf")
    to_huggingface(resolve_model(str(run)), folder)
    return folder


def sentence(generator: random.Random, most: int) -> str:
    """Return some words."""
    return " ".join(generator.choice(WORDS) for _ in range(generator.randrange(3, most)))


def some_lambada(path: Path, passages: int = 40) -> None:
    """Write passages, of which some are longer than a context."""
    generator = random.Random(1)
    rows = [
        {"text": f'"{sentence(generator, 90).capitalize()}," {sentence(generator, 9)}'}
        for _ in range(passages)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def some_wikitext(path: Path, pages: int = 5) -> list[str]:
    """Write articles in WikiText's tokens; return them as the harness's dataset has them."""
    generator = random.Random(2)
    found = []
    for number in range(pages):
        lines = [f" = Castle {number} = ", " "]
        for _ in range(generator.randrange(1, 4)):
            body = sentence(generator, 60)
            lines += [
                " = = Part = = ",
                f' The @-@ {body} , " {body} " ( {body} ) 1 @,@ 204 . ',
                " ",
            ]
        found.append("\n".join(lines))
    path.write_text("\n".join(found) + "\n")
    return [*found[:-1], f"{found[-1]}\n"]
