"""`yuzogpt evaluate`: the model, the benchmarks, and how they are scored."""

from typing import Annotated, Literal

from pydantic import Field

from yuzogpt.config.registry import TASKS, OneOf
from yuzogpt.config.section import (
    CONTEXT,
    MODEL,
    RAY_ADDRESS,
    STORAGE,
    Auto,
    Count,
    DeviceSettings,
    Names,
    Positive,
    Section,
    setting,
)


class EvaluatedModelSettings(Section):
    """Which model is evaluated, and where results are written."""

    model: str = setting("gpt2", MODEL, path="model")
    out_dir: str = setting(
        "", "directory for results.json and partial results; empty: eval-<model>", path="local"
    )
    storage: str = setting("", STORAGE)
    overwrite: bool = setting(False, "evaluate again what out_dir has results of")


class BenchmarkSettings(Section):
    """Which benchmarks are run, and how they are scored."""

    tasks: Annotated[Names, OneOf(TASKS, (("loss", "on a prepared corpus"),))] = setting(
        ("lambada", "wikitext2"), "comma-separated names"
    )
    protocol: Literal["paper", "harness"] = setting(
        "paper", "score as in the GPT-2 paper, or as lm-evaluation-harness does"
    )
    benchmark_dir: str = setting(
        "",
        "directory with the benchmarks' files; empty: the cache, downloaded on first use where "
        "possible",
        path="local",
    )
    context: Count = setting(0, CONTEXT, "tokens")
    stride: Positive = setting(512, "paper: tokens scored by each window after the first", "tokens")
    stop_word_filter: bool = setting(
        False, "paper: never predict a stop word for LAMBADA (the paper's own figure has this on)"
    )
    limit: Count = setting(
        0, "lines, passages or questions of each task to use, from its start; 0: all"
    )
    dataset: str = setting("openwebtext", "loss: name of the prepared corpus")
    data_dir: str = setting(
        "",
        "loss: directory of the prepared corpus; empty: data/<dataset>",
        path="remote",
        if_empty="data/{dataset}",
    )
    loss_windows: Count = setting(
        2000,
        "loss: windows to read of each split, evenly spaced; 0: all (40 KB of memory each)",
        "windows",
    )


class EvaluationWorkSettings(Section):
    """Where the evaluation runs."""

    batch_size: Positive = setting(8, "passages per forward pass, at most", "passages")
    shard_size: Annotated[int, Field(ge=8)] = setting(
        128, "passages between saves of partial results", "passages"
    )
    num_workers: Auto | Count = setting(
        "auto",
        "concurrent Ray tasks; auto: one per GPU, or one; 0: run in this process, without Ray",
    )
    ray_address: str = setting("", RAY_ADDRESS)


class EvaluationDeviceSettings(DeviceSettings):
    """What the evaluation runs on."""

    dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "dtype of matrix products (autocast); bfloat16 changes results in the third digit",
    )


class EvaluateSettings(Section):
    """`yuzogpt evaluate`."""

    evaluated: EvaluatedModelSettings = EvaluatedModelSettings()
    benchmarks: BenchmarkSettings = BenchmarkSettings()
    workers: EvaluationWorkSettings = EvaluationWorkSettings()
    device: EvaluationDeviceSettings = EvaluationDeviceSettings()
