"""A random GPT-2, and small benchmark files, for the tests of evaluation."""

import json
import random
import re
from pathlib import Path

import torch

from tests.checkpoints.files import write_checkpoint
from tests.inference.engines import small_model
from yuzogpt import checkpoints, tokenization
from yuzogpt.checkpoints.export import to_huggingface
from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import TrainSettings

WORDS = (
    "the king of night and all that ends well thou art not what I would call a friend said she to "
    "him as they went down into the old garden where nobody had been since summer came"
).split()


def random_model(run: Path, seed: int = 1, *, scale: float = 1.0, **shape: int) -> Path:
    """Write a run with a random model and GPT-2's tokenizer; return it."""
    model = small_model(seed, **{"vocab_size": 50257, "block_size": 64, **shape})
    model.ln_f.weight.data *= scale
    settings = TrainSettings.model_validate({"model": model.settings.model_dump()})
    state = checkpoints.State(20, 20, settings.model_dump(), "none", "none", {})
    tokenizer = tokenization.to_bytes(tokenization.gpt2_tokenizer())
    write_checkpoint(run, state, model.state_dict(), {}, tokenizer)
    return run


def exported(run: Path) -> Path:
    """Export a run as a Hugging Face folder; return the folder."""
    folder = run.with_name("hf")
    to_huggingface(resolve_model(str(run)), folder)
    return folder


def sentence(generator: random.Random, most: int) -> str:
    """Return 3 or more random words, fewer than `most`."""
    return " ".join(generator.choice(WORDS) for _ in range(generator.randrange(3, most)))


def write_lambada(path: Path, passages: int = 40) -> None:
    """Write passages, some of them longer than the model's context."""
    generator = random.Random(1)
    rows = [
        {"text": f'"{sentence(generator, 90).capitalize()}," {sentence(generator, 9)}'}
        for _ in range(passages)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def end_with_greedy_words(path: Path, name: str) -> None:
    """Let each third passage of LAMBADA end with the word that the model predicts."""
    reference = resolve_model(name)
    model, tokenizer = load_model(reference), reference.tokenizer()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::3]:
        words, said = row["text"].split(" "), ""
        while not re.fullmatch(r" [A-Za-z]+", said):
            words.pop()
            ids = tokenizer.encode(" ".join(words)).tolist()[-reference.shape.block_size :]
            with torch.no_grad():
                said = tokenizer.decode([int(model(torch.tensor([ids]))[0, -1].argmax())])
        row["text"] = " ".join(words) + said
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_hellaswag(path: Path, scenes: int = 24) -> None:
    """Write scenes, with markup that is removed."""
    generator = random.Random(3)
    rows = []
    for _ in range(scenes):
        ends = [sentence(generator, 12) for _ in range(4)]
        ends[1:3] = f"[header] {ends[1]} [title] {ends[0]}", f"{ends[2]} [step]"
        rows.append({
            "activity_label": sentence(generator, 5), "ctx_a": f"{sentence(generator, 20)}.",
            "ctx_b": sentence(generator, 5), "endings": ends, "label": generator.randrange(4),
        })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_wikitext(path: Path, pages: int = 5) -> list[str]:
    """Write tokenized articles as in WikiText; return them as in the harness's dataset."""
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
