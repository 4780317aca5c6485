"""`yuzogpt sample`."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from yuzogpt.config.section import (
    Count,
    DeviceSettings,
    NonNegative,
    Positive,
    Section,
    Seed,
    read_strings,
    setting,
)
from yuzogpt.errors import UserError


class SamplingSettings(Section):
    """What is sampled, and how."""

    out_dir: str = setting("out", "the run to sample from: its best checkpoint", path="store")
    init_from: str = setting(
        "resume",
        "resume: out_dir; else gpt2, gpt2-medium, gpt2-large, gpt2-xl or a directory",
        path="model",
    )
    start: str = setting(
        "\n", "the prompt, or FILE:path; <|endoftext|> is that token; empty: a document begins"
    )
    prompts: str = setting(
        "",
        'many prompts: a file with {"prompt": "..."} on each line, instead of start',
        path="local",
        if_empty="",
    )
    interactive: bool = setting(
        False, "each line of standard input is a prompt; one sample a line, as it comes"
    )
    num_samples: Positive = setting(10, "samples to draw, of each prompt")
    max_new_tokens: Positive = setting(500, "most tokens of each sample", "tokens")
    context: Count = setting(
        0, "what the model sees at a time; 0: its block_size; more: rotary, alibi only", "tokens"
    )
    temperature: NonNegative = setting(0.8, "0: always the likeliest token")
    top_k: Count = setting(200, "only the k likeliest tokens; 0: all", "tokens")
    top_p: Annotated[float, Field(gt=0, le=1)] = setting(
        1.0, "only the likeliest tokens that have this share of what top_k leaves; 1: all"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = setting(
        0.0, "only tokens at least so likely as this share of the likeliest one's; 0: all"
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = setting(
        1.0, "above 1: tokens that were there already are less likely"
    )
    stop: Annotated[tuple[str, ...], BeforeValidator(read_strings)] = setting(
        (), 'a sample ends before this text, or before one of ["these", "texts"]'
    )
    stop_at_end_of_text: bool = setting(True, "a sample ends where its document does")
    seed: Seed = setting(1337, "sample i of a prompt, or of interactive, is drawn with seed + i")
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")


class SamplingDeviceSettings(DeviceSettings):
    """What sampling runs on."""

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = setting(  # type: ignore[assignment]
        "auto", "of weights; auto: bfloat16 on GPUs that have it, else float32; int8: on CPUs"
    )
    compile: bool = setting(
        False, "torch.compile for decoding, on CUDA: it starts later; what it gains is not measured"
    )

    @model_validator(mode="after")
    def is_compiled_on_cuda(self) -> Self:
        """What a device `auto` will be, shows where the model is loaded (sampling/load.py)."""
        if self.compile and self.device != "auto":
            check_not_compiled(self.device)
        return self


def check_not_compiled(device: str) -> None:
    """Raise UserError for a device that decoding is not compiled on."""
    if device != "cuda":
        raise UserError(
            f"--compile=True: decoding is compiled on CUDA only, not on {device}; leave it out"
        )


class SampleSettings(Section):
    """`yuzogpt sample`."""

    sampling: SamplingSettings = SamplingSettings()
    device: SamplingDeviceSettings = SamplingDeviceSettings()
