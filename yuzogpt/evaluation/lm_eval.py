"""Run any task of lm-evaluation-harness on any of our models.

    pip install lm-eval
    python -m yuzogpt.evaluation.lm_eval run --model_args model=out-gpt2 --tasks lambada_openai

This is the harness's own command with one more kind of model, `yuzogpt`, which is the default of
`run`. Its `--model_args` are model, context, device, dtype and threads.
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
    """Adapter of our models to the harness's interface."""

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
        """`model`: as for the other commands; `context`: in tokens, 0 for its block_size."""
        super().__init__()
        if wrong := [name for name, value in unknown.items() if value is not None]:
            known = "model, context, device, dtype, threads"
            raise UserError(f"--model_args: {', '.join(wrong)} is not known; known: {known}")
        self.reference = resolve_model(model, int(context))
        self.own_tokenizer = self.reference.tokenizer()
        name = available_device({"cuda:0": "cuda", None: "auto"}.get(device, device))
        options = {"device": name, "dtype": dtype, "threads": threads}
        try:
            self.settings = DeviceSettings.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"--model_args {first['loc'][0]}={first['input']}: {first['msg']}"
            ) from None
        self.batch_size = parse_batch_size(batch_size)
        self.hardware = choose_hardware(self.settings, World())
        self.model = load_model(self.reference).to(self.hardware.device)
        self.block_size = self.reference.shape.block_size

    @property
    def eot_token_id(self) -> int:
        """The token that stands for the beginning of a text."""
        return start_of(self.own_tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, with nothing added; `<|endoftext|>` in it is the token."""
        return encode_prompt(self.own_tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        passages = []
        for _texts, context, text in requests:
            tokens = tuple([*context, *text][-(self.block_size + 1) :])
            passages.append(Passage(tokens, min(len(text), len(tokens) - 1)))
        scores = score(self.model, passages, self.batch_size, self.hardware)
        return [(each.logprob, each.is_greedy) for each in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows that do not overlap."""
        passages, owners = list[Passage](), list[int]()
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text)
            of_text = list(windows(ids, self.eot_token_id, self.block_size, self.block_size))
            passages += of_text
            owners += [number] * len(of_text)
        logprobs = [0.0] * len(requests)
        scores = score(self.model, passages, self.batch_size, self.hardware)
        for owner, of_window in zip(owners, scores, strict=True):
            logprobs[owner] += of_window.logprob
        return logprobs

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts in one batch, each until a stop string or the end of text."""
        engine = load_engine(self.reference, self.own_tokenizer, self.settings, self.batch_size)
        ours = [self._to_request(n, *request.args) for n, request in enumerate(requests)]
        return list(complete(engine, ours))

    def _to_request(self, number: int, context: str, gen_kwargs: dict[str, Any]) -> Request:
        options = normalize_gen_kwargs(gen_kwargs, DEFAULT_NEW_TOKENS)
        max_new_tokens = options["max_gen_toks"]
        max_context = max(1, self.block_size - max_new_tokens)
        ids = self.tok_encode(context)[-max_context:] or [self.eot_token_id]
        sampling = SamplingParams(
            temperature=float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0,
            top_k=int(options.get("top_k") or 0),
            top_p=float(options.get("top_p") or 1.0),
            seed=number,  # the same text may be requested several times
        )
        return Request(ids, max_new_tokens, sampling, tuple(options["until"] or ()))


def available_device(device: str) -> str:
    """Return the CPU instead of a GPU that is missing, as the harness's own model does.

    The harness requests cuda:0 if the user names no device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        complain("yuzogpt: no CUDA device; using the CPU")
        return "cpu"
    return device


def parse_batch_size(batch_size: int | str) -> int:
    """Return the harness's batch size as a number; UserError if it is not one."""
    if str(batch_size).startswith("auto"):
        return 8
    try:
        size = int(batch_size)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"--batch_size={batch_size}: give a number from 1 on, or auto")
    return size


def with_our_model(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of the harness's command, with `--model yuzogpt` unless one is named."""
    first = arguments[0] if arguments else "--help"
    names = ("--model=", "-M", "--config", "-C")  # a configuration may name a model
    has_model = any(arg == "--model" or arg.startswith(names) for arg in arguments)
    runs_nothing = first in ("ls", "validate", "-h", "--help") or arguments == ["run"]
    return [*arguments] if has_model or runs_nothing else [*arguments, "--model", "yuzogpt"]


def main() -> None:
    """Run the harness's command; our model is its default."""
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
