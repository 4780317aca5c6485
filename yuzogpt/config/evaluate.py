"""`yuzogpt evaluate`: which benchmarks, of which model, counted how."""

from typing import Annotated, Literal

from pydantic import Field

from yuzogpt.config.section import Auto, Count, DeviceSettings, Names, Positive, Section, setting


class EvaluatedModelSettings(Section):
    """What is evaluated, and where the results go."""

    model: str = setting(
        "gpt2",
        "a run (its best checkpoint), a checkpoint or Hugging Face folder, gpt2 ... gpt2-xl",
        path="model",
    )
    out_dir: str = setting(
        "", "results.json, and what is done so far; empty: eval-<model>", path="local", if_empty=""
    )
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")
    overwrite: bool = setting(False, "evaluate anew what out_dir has results of")


class BenchmarkSettings(Section):
    """What is read, and how it is counted."""

    tasks: Names = setting(
        ("lambada", "wikitext2"),
        "names with commas between: lambada, wikitext2, ptb, wikitext103, enwik8, text8, 1bw, "
        "cbt_cn, cbt_ne, hellaswag; loss: of a prepared corpus",
    )
    protocol: Literal["paper", "harness"] = setting(
        "paper", "paper: the GPT-2 paper's; harness: lm-evaluation-harness's"
    )
    benchmark_dir: str = setting(
        "",
        "where the benchmarks' files are; empty: the cache, filled from the web where it can be",
        path="local",
        if_empty="",
    )
    context: Count = setting(
        0, "what the model sees at a time; 0: its block_size; more: rotary, alibi only", "tokens"
    )
    stride: Positive = setting(
        512, "paper: tokens that each window foretells after the first", "tokens"
    )
    stop_word_filter: bool = setting(
        False, "paper: a stop word is no answer to LAMBADA (the paper's own figure has this on)"
    )
    limit: Count = setting(
        0, "only the first lines, passages or questions of each task, to try it; 0: all"
    )
    dataset: str = setting("openwebtext", "loss: name of the prepared corpus")
    data_dir: str = setting(
        "", "loss: its directory; empty: data/<dataset>", path="remote", if_empty="data/{dataset}"
    )
    loss_windows: Count = setting(
        2000, "loss: windows of each split, evenly spaced; 0: all (40 KB of memory each)", "windows"
    )


class EvaluationWorkSettings(Section):
    """Who does the work."""

    batch_size: Positive = setting(8, "passages that one forward pass holds", "passages")
    shard_size: Annotated[int, Field(ge=8)] = setting(
        128, "passages between two looks at what is done", "passages"
    )
    num_workers: Auto | Count = setting(
        "auto", "Ray tasks at a time; auto: one per GPU, or one; 0: this process, without Ray"
    )
    ray_address: str = setting("", "join this Ray cluster; empty: RAY_ADDRESS, else embedded Ray")


class EvaluationDeviceSettings(DeviceSettings):
    """What it runs on."""

    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of matrix products (autocast); bfloat16 changes the third digit"
    )


class EvaluateSettings(Section):
    """`yuzogpt evaluate`."""

    evaluated: EvaluatedModelSettings = EvaluatedModelSettings()
    benchmarks: BenchmarkSettings = BenchmarkSettings()
    workers: EvaluationWorkSettings = EvaluationWorkSettings()
    device: EvaluationDeviceSettings = EvaluationDeviceSettings()
