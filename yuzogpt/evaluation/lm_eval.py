"""Any task of lm-evaluation-harness on any model that has a name here.

    pip install lm-eval
    python -m yuzogpt.evaluation.lm_eval run --model_args model=out-gpt2 --tasks lambada_openai

In: the harness's requests. Out: log-likelihoods and texts. It is the harness's own command, with
one more kind of model, `yuzogpt`, which `run` takes where no other is named: `--model_args` takes
model, context, device, dtype and threads.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from pydantic import ValidationError

from yuzogpt.checkpoints.load import load_model
from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.config import DeviceSettings
from yuzogpt.console.terminal import complain
from yuzogpt.errors import UserError
from yuzogpt.evaluation.passages import Passage, windows
from yuzogpt.evaluation.scoring import score
from yuzogpt.inference.load import load_engine
from yuzogpt.inference.requests import Request, SamplingParams
from yuzogpt.inference.sample import complete
from yuzogpt.runtime.device import choose_hardware
from yuzogpt.runtime.world import World
from yuzogpt.storage.atomic_files import expect_no_home
from yuzogpt.tokenization.tokenizer import encode_prompt, start_of

DEFAULT_NEW_TOKENS = 256  # the harness's


@register_model("yuzogpt")
class YuzoGPT(TemplateLM):  # type: ignore[misc]
    """A model of ours, as the harness sees one."""

    def __init__(
        self,
        model: str = "gpt2",
        batch_size: int | str = 8,
        device: str = "auto",
        dtype: str = "float32",
        threads: int = 0,
        context: int = 0,
        **unknown: Any,
    ) -> None:
        """`model`: whatever the other commands take; `context`: 0 for its block_size."""
        super().__init__()
        if wrong := [name for name, value in unknown.items() if value is not None]:
            known = "model, context, device, dtype, threads"
            raise UserError(f"--model_args: {', '.join(wrong)} is not known; known: {known}")
        self.reference = resolve_model(model, int(context))
        self.tokens = self.reference.tokenizer()
        name = without_gpu({"cuda:0": "cuda", None: "auto"}.get(device, device))
        given = {"device": name, "dtype": dtype, "threads": threads}
        try:
            self.settings = DeviceSettings.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"--model_args {first['loc'][0]}={first['input']}: {first['msg']}"
            ) from None
        self.batch_size = passages_at_a_time(batch_size)
        self.hardware = choose_hardware(self.settings, World())
        self.model = load_model(self.reference).to(self.hardware.device)
        self.block_size = self.reference.shape.block_size

    @property
    def eot_token_id(self) -> int:
        """The token that stands for the beginning of a text."""
        return start_of(self.tokens)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text; nothing is added. `<|endoftext|>` in it is the token."""
        return encode_prompt(self.tokens, string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        passages = []
        for _texts, context, text in requests:
            tokens = tuple([*context, *text][-(self.block_size + 1) :])
            passages.append(Passage(tokens, min(len(text), len(tokens) - 1)))
        scores = score(self.model, passages, self.batch_size, self.hardware)
        return [(one.logprob, one.is_greedy) for one in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows that have nothing in common."""
        passages, owners = list[Passage](), list[int]()
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text)
            mine = list(windows(ids, self.eot_token_id, self.block_size, self.block_size))
            passages += mine
            owners += [number] * len(mine)
        found = [0.0] * len(requests)
        scores = score(self.model, passages, self.batch_size, self.hardware)
        for owner, one in zip(owners, scores, strict=True):
            found[owner] += one.logprob
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Go on with texts, all of them at once, until a stop string or the end of text."""
        device = self.settings
        engine = load_engine(self.reference, self.tokens, device, self.batch_size)
        asked = [self._to_request(n, *request.args) for n, request in enumerate(requests)]
        return list(complete(engine, asked))

    def _to_request(self, number: int, context: str, given: dict[str, Any]) -> Request:
        wanted = normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS)
        new = wanted["max_gen_toks"]
        room = max(1, self.block_size - new)
        ids = self.tok_encode(context)[-room:] or [self.eot_token_id]
        sampling = SamplingParams(
            temperature=float(wanted.get("temperature", 1.0)) if wanted["do_sample"] else 0.0,
            top_k=int(wanted.get("top_k") or 0),
            top_p=float(wanted.get("top_p") or 1.0),
            seed=number,  # the same text may be asked for several times
        )
        return Request(ids, new, sampling, tuple(wanted["until"] or ()))


def without_gpu(device: str) -> str:
    """Return the CPU in place of a GPU that is not there.

    The harness asks for cuda:0 where nobody named a device; its own model does the same.
    """
    if device == "cuda" and not torch.cuda.is_available():
        complain("yuzogpt: no CUDA device here; the CPU computes")
        return "cpu"
    return device


def passages_at_a_time(batch_size: int | str) -> int:
    """Return the harness's batch size as a number; UserError if it is none."""
    if str(batch_size).startswith("auto"):
        return 8
    try:
        found = int(batch_size)
    except ValueError:
        found = 0
    if found < 1:
        raise UserError(f"--batch_size={batch_size}: give a number from 1 on, or auto")
    return found


def with_our_model(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of the harness's command; ours is the model where none is named."""
    first = arguments[0] if arguments else "--help"
    names = ("--model=", "-M", "--config", "-C")  # a configuration may name one
    is_named = any(one == "--model" or one.startswith(names) for one in arguments)
    asks_only = first in ("ls", "validate", "-h", "--help") or arguments == ["run"]
    return [*arguments] if is_named or asks_only else [*arguments, "--model", "yuzogpt"]


def main() -> None:
    """Run the harness's command with our models as its default."""
    expect_no_home()
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = with_our_model(sys.argv[1:])
    try:
        cli_evaluate()
    except UserError as error:
        complain(f"yuzogpt: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
