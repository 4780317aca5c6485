"""`yuzogpt sample`."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from yuzogpt.config.section import (
    CONTEXT,
    MODEL,
    STORAGE,
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


class PromptSettings(Section):
    """Which model continues which prompts."""

    out_dir: str = setting("out", "run to sample from (its best checkpoint)", path="store")
    init_from: str = setting(
        "resume",
        "resume: sample from out_dir; else gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a directory",
        path="model",
    )
    start: str = setting(
        "\n",
        "prompt, or FILE:path to read it from a file; <|endoftext|> is that token; empty: start a "
        "new document",
        escapes=True,
    )
    prompts: str = setting(
        "", 'file of prompts, one {"prompt": "..."} per line; replaces start', path="local"
    )
    interactive: bool = setting(
        False, "read prompts from standard input, one per line, and answer each with one sample"
    )
    num_samples: Positive = setting(10, "samples per prompt")


class GenerationSettings(Section):
    """How a prompt is continued."""

    max_new_tokens: Positive = setting(500, "most tokens to generate per sample", "tokens")
    temperature: NonNegative = setting(0.8, "sampling temperature; 0: always the most likely token")
    top_k: Count = setting(200, "sample from the k most likely tokens; 0: from all", "tokens")
    top_p: Annotated[float, Field(gt=0, le=1)] = setting(
        1.0,
        "sample from the most likely tokens that together have this share of the probability, "
        "after top_k; 1: from all",
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = setting(
        0.0,
        "sample from tokens at least this fraction as likely as the most likely one; 0: from all",
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = setting(
        1.0, "values above 1 make tokens that already occurred less likely"
    )
    stop: Annotated[tuple[str, ...], BeforeValidator(read_strings)] = setting(
        (), 'end a sample before this text, or before any of ["these", "texts"]'
    )
    stop_at_end_of_text: bool = setting(True, "end a sample at the end-of-text token")
    seed: Seed = setting(1337, "sample i of a prompt (or of an interactive session) uses seed + i")


class SamplingSettings(GenerationSettings, PromptSettings):
    """What is sampled, and how."""

    context: Count = setting(0, CONTEXT, "tokens")
    storage: str = setting("", STORAGE)


class SamplingDeviceSettings(DeviceSettings):
    """What sampling runs on."""

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = setting(  # type: ignore[assignment]
        "auto",
        "dtype of the weights; auto: bfloat16 on GPUs that support it, else float32; int8: CPUs "
        "only",
    )
    compile: bool = setting(
        False,
        "use torch.compile for decoding, on CUDA only; start-up is slower, the speed-up is not "
        "measured",
    )

    @model_validator(mode="after")
    def is_compiled_on_cuda(self) -> Self:
        """Only CUDA compiles; for `auto` inference/load.py checks it once the device is known."""
        if self.compile and self.device != "auto":
            check_not_compiled(self.device)
        return self


def check_not_compiled(device: str) -> None:
    """Raise UserError for a device on which decoding cannot be compiled."""
    if device != "cuda":
        raise UserError(
            f"--compile=True: decoding is compiled on CUDA only, not on {device}; leave it out"
        )


class SampleSettings(Section):
    """`yuzogpt sample`."""

    sampling: SamplingSettings = SamplingSettings()
    device: SamplingDeviceSettings = SamplingDeviceSettings()


class GenerateSettings(Section):
    """`LanguageModel.generate`, in Python."""

    generation: GenerationSettings = GenerationSettings()


class LoadedModelSettings(Section):
    """Which model is loaded."""

    model: str = setting("out", MODEL, path="model")
    context: Count = setting(0, CONTEXT, "tokens")
    storage: str = setting("", STORAGE)


class LoadSettings(Section):
    """`yuzogpt.load`, in Python."""

    loaded: LoadedModelSettings = LoadedModelSettings()
    device: SamplingDeviceSettings = SamplingDeviceSettings()
