"""Every setting, once: its name, default, unit and meaning.

In: nothing. Out: one pydantic model for each verb (`TrainSettings`, `PrepareSettings`,
`SampleSettings`), composed of sections. Leaf names are nanoGPT's where nanoGPT has one, and unique
within a verb, so that `--n_layer=4` needs no section. How values get in (defaults, YAML files,
`--key=value`) is in overrides.py.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
NonNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]  # of a corpus, and its directory
Auto = Literal["auto"]
Part = Literal["whole", "first", "second"]  # of a split; the halves have no window in common


def setting(default: Any, meaning: str, unit: str = "", *, frozen: bool = False) -> Any:
    """Declare one setting.

    `frozen` settings decide what a run computes: they may not change when the run is resumed.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "frozen": frozen})


def read_workers(value: Any) -> Any:
    """Read how many workers: auto, a number, or least..most."""
    least, dots, most = str(value).partition("..")
    if value == "auto" or (least.isdigit() and not dots):
        return value if value == "auto" else int(least)
    if least.isdigit() and most.isdigit() and 0 < int(least) <= int(most):
        return f"{int(least)}..{int(most)}"
    raise ValueError("write auto, a number, or least..most such as 1..4")


def read_strings(value: Any) -> Any:
    """Read one string, or a list of them, which on the command line is JSON."""
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    return (value,) if isinstance(value, str) else value


class Section(BaseModel):
    """A group of settings: immutable, and without room for a misspelt one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(Section):
    """Which prepared corpus is read."""

    dataset: Name = setting("shakespeare_char", "name of the prepared corpus")
    data_dir: str = setting("", "its directory; empty: data/<dataset>")


class ModelSettings(Section):
    """The shape of the GPT."""

    n_layer: Positive = setting(12, "transformer blocks", frozen=True)
    n_head: Positive = setting(12, "attention heads; divides n_embd", frozen=True)
    n_embd: Positive = setting(768, "width of the residual stream", "channels", frozen=True)
    block_size: Positive = setting(1024, "context length", "tokens", frozen=True)
    bias: bool = setting(False, "biases in linear layers and norms (GPT-2: True)", frozen=True)
    dropout: Fraction = setting(0.0, "dropout; 0 for pretraining, 0.1+ for finetuning", frozen=True)
    vocab_size: Count = setting(0, "0: taken from the corpus", "tokens", frozen=True)
    vocab_multiple: Positive = setting(
        64, "embedding rows are padded to a multiple of this; padding is never sampled", frozen=True
    )

    def count_weights(self) -> int:
        """Count all weights, positions and padding included."""
        vocab = -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
        matrices, norms = 12 * self.n_embd**2, 2 * self.n_embd
        biases = 11 * self.n_embd if self.bias else 0
        in_norm = self.n_embd * (2 if self.bias else 1)
        embeddings = (vocab + self.block_size) * self.n_embd
        return embeddings + self.n_layer * (matrices + norms + biases) + in_norm

    @model_validator(mode="after")
    def heads_divide_width(self) -> Self:
        """Each head gets an equal share of the channels."""
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        return self


class OptimizerSettings(Section):
    """AdamW, as in nanoGPT."""

    learning_rate: NonNegative = setting(6e-4, "peak learning rate", frozen=True)
    weight_decay: NonNegative = setting(0.1, "on matrices only", frozen=True)
    beta1: Fraction = setting(0.9, "decay of AdamW's first moment", frozen=True)
    beta2: Fraction = setting(0.95, "decay of AdamW's second moment", frozen=True)
    grad_clip: NonNegative = setting(1.0, "largest gradient norm; 0: no clipping", frozen=True)


class FinetuningSettings(Section):
    """What of a pretrained model learns, and how fast."""

    freeze_layers: Count = setting(
        0,
        "the first n layers and the embeddings (so the output matrix, too) do not learn; 0: all do",
        "layers",
        frozen=True,
    )
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = setting(
        1.0,
        "each layer's learning rate over that of the one above; the embeddings' is the lowest",
        frozen=True,
    )


class ScheduleSettings(Section):
    """How long, and the learning rate on the way."""

    max_iters: Positive = setting(600_000, "optimizer steps in all", "steps")
    decay_lr: bool = setting(True, "cosine decay to min_lr; False: constant", frozen=True)
    warmup_iters: Count = setting(2_000, "linear warmup", "steps", frozen=True)
    lr_decay_iters: Positive = setting(600_000, "where the decay ends", "steps", frozen=True)
    min_lr: NonNegative = setting(6e-5, "learning rate after the decay", frozen=True)


class BatchSettings(Section):
    """The global batch of one step: batch_size x gradient_accumulation_steps rows, on any world."""

    batch_size: Positive = setting(12, "most rows that one forward pass holds", "rows")
    gradient_accumulation_steps: Positive = setting(
        40, "the global batch is this many times batch_size; workers share it out", "micro-steps"
    )

    @property
    def global_rows(self) -> int:
        """Rows in one optimizer step, over all workers."""
        return self.batch_size * self.gradient_accumulation_steps


class EvaluationSettings(Section):
    """When the validation loss is looked at, and how closely."""

    eval_interval: Positive = setting(2_000, "between evaluations and checkpoints", "steps")
    eval_iters: Count = setting(
        200,
        "val_loss_estimate reads this many batches of evenly spaced windows; 0: the whole split",
        "batches",
    )
    eval_only: bool = setting(False, "evaluate the whole val split and stop")
    val_part: Part = setting(
        "whole",
        "which half of the val split is looked at, or all of it; a sweep searches on the first",
    )


class CheckpointSettings(Section):
    """When checkpoints are written, and which are kept."""

    checkpoint_interval: Count = setting(
        0, "between checkpoints, besides those at evaluations; 0: at evaluations only", "steps"
    )
    keep_last: Positive = setting(2, "newest checkpoints kept, to go on from", "checkpoints")
    keep_best: Count = setting(1, "best checkpoints whose weights are kept", "checkpoints")


class GuardSettings(Section):
    """What happens to a step whose numbers are wrong."""

    max_skipped: Positive = setting(
        10, "a step whose loss or gradient is not finite is skipped; so many in a row end the run"
    )
    spike_sigmas: NonNegative = setting(
        6.0,
        "a loss so many standard deviations above its running mean is a spike; 0: none is",
        frozen=True,
    )
    skip_spikes: bool = setting(False, "skip the step of a spike, too", frozen=True)


class LogSettings(Section):
    """What is written down, and where."""

    log_interval: Positive = setting(1, "between rows of metrics.jsonl", "steps")
    health_interval: Count = setting(
        100, "between looks at each layer's gradient, weights and update; 0: none", "steps"
    )
    network_interval: Count = setting(
        1_000,
        "between measurements of the network, with several workers, from the start; 0: none",
        "steps",
    )
    wandb_log: bool = setting(False, "log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = setting("yuzogpt", "W&B project")
    wandb_run_name: str = setting("", "W&B run name; empty: the name of out_dir")
    wandb_key_file: str = setting("", "file (mode 0600) with the W&B key; empty: wandb's own ways")


class RunSettings(Section):
    """One run is one out_dir: the same command again resumes it."""

    out_dir: str = setting("out", "everything that the run writes; s3://bucket/folder works, too")
    init_from: str = setting(
        "scratch",
        "where weights start: scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a "
        "directory (run, checkpoint, Hugging Face folder)",
        frozen=True,
    )
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")
    overwrite: bool = setting(False, "delete the run in out_dir and start anew")
    seed: Seed = setting(1337, "of weights, order of data and dropout", frozen=True)


class DeviceSettings(Section):
    """What the arithmetic runs on."""

    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "auto: cuda, mps, else cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of matrix products (autocast); auto: bfloat16 where the hardware has it"
    )
    threads: Count = setting(0, "per worker; 0: the node's cores shared out", "threads")


class TrainingDeviceSettings(DeviceSettings):
    """What training runs on."""

    compile: Auto | bool = setting("auto", "torch.compile; auto: on CUDA only")


class ParallelSettings(Section):
    """How workers share one model."""

    parallel: Literal["auto", "ddp", "fsdp"] = setting(
        "auto",
        "ddp: each worker holds the model; fsdp: a part of weights, gradients and optimizer state; "
        "auto: fsdp where ddp would fill more than half of a GPU",
    )
    activation_checkpointing: bool = setting(
        False, "keep no activations within a layer, compute them again: less memory, 1/3 more work"
    )
    ddp_bucket_mb: Annotated[float, Field(gt=0)] = setting(
        25.0, "ddp averages gradients in buckets of this size", "MiB"
    )


class WorkerSettings(Section):
    """Who does the work."""

    num_workers: Annotated[int | str, BeforeValidator(read_workers)] = setting(
        "auto",
        "Ray Train workers; auto: one per GPU, or one; 1..4: as many of them as there is room for, "
        "while it runs; 0: this process, without Ray",
    )
    ray_address: str = setting("", "join this Ray cluster; empty: RAY_ADDRESS, else embedded Ray")
    max_failures: Count = setting(3, "worker crashes that a command survives", "restarts")
    max_preemptions: Annotated[int, Field(ge=-1)] = setting(
        -1, "preempted nodes that a command survives, apart from crashes; -1: any", "restarts"
    )
    spare_workers: bool = setting(
        True, "on embedded Ray, keep as many idle processes ready: a dead worker is replaced sooner"
    )
    hang_timeout: Annotated[float, Field(gt=0)] = setting(
        100.0, "workers that stand still for so long are named and started again", "seconds"
    )

    def span(self, auto: int) -> tuple[int, int]:
        """Return the least and the most workers; `auto`: how many that is."""
        wanted = auto if self.num_workers == "auto" else self.num_workers
        if isinstance(wanted, int):
            return wanted, wanted
        least, most = wanted.split("..")
        return int(least), int(most)


class TrainSettings(Section):
    """`yuzogpt train`."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    batch: BatchSettings = BatchSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    guard: GuardSettings = GuardSettings()
    log: LogSettings = LogSettings()
    run: RunSettings = RunSettings()
    device: TrainingDeviceSettings = TrainingDeviceSettings()
    parallel: ParallelSettings = ParallelSettings()
    workers: WorkerSettings = WorkerSettings()


class SweepSettings(Section):
    """How settings are searched for."""

    num_samples: Positive = setting(
        16, "trials in all; the first has the settings' own values; grid: all there are", "trials"
    )
    max_concurrent_trials: Count = setting(
        0, "trials at a time; 0: as many as there is room for", "trials"
    )
    search_algorithm: Literal["tpe", "random", "grid"] = setting(
        "tpe", "how values are chosen: Optuna's TPE, at random, or every combination", frozen=True
    )
    search_seed: Seed = setting(1337, "of the values that are chosen", frozen=True)
    scheduler: Literal["asha", "none"] = setting(
        "asha", "asha: trials that fall behind are stopped; none: each goes to its end", frozen=True
    )
    grace_steps: Count = setting(
        0, "asha stops no trial before; 0: two evaluations", "steps", frozen=True
    )
    reduction_factor: Annotated[int, Field(ge=2)] = setting(
        3,
        "of the trials that reach a rung, asha lets one in so many go on to the next",
        frozen=True,
    )
    final_seeds: Count = setting(
        3, "fresh seeds, with each of which default and winner are trained and compared; 0: none"
    )


class TuneSettings(TrainSettings):
    """`yuzogpt tune`: what all trials have in common, and the search."""

    sweep: SweepSettings = SweepSettings()


class CorpusSettings(Section):
    """Which text becomes which corpus."""

    dataset: Name = setting(
        "shakespeare_char", "name of the corpus; a new name needs --source and --tokenizer"
    )
    source: str = setting(
        "",
        "text: a file, folder or glob, here or at s3://, gs://, hf:// (parquet, JSON lines, plain "
        "text; .gz, .zst); empty: the corpus's own, downloaded",
    )
    tokenizer: Literal["", "char", "gpt2"] = setting("", "empty: the corpus's own")
    data_dir: str = setting("", "where it goes; empty: data/<dataset>")
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")
    overwrite: bool = setting(False, "replace what data_dir holds")


class LargeCorpusSettings(Section):
    """How a corpus is prepared that need not fit in memory: openwebtext, folders, parquet, ..."""

    text_column: str = setting("text", "of parquet and JSON lines")
    by_line: bool = setting(False, "each line of plain text is a document; False: each file")
    split_rule: Literal["", "tail", "nanogpt", "hash"] = setting(
        "",
        "tail: the last tenth; nanogpt: its shuffle with seed 2357; hash: by each document's "
        "SHA-256; empty: the corpus's own, else tail for one text file, hash for more",
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.0005, "share of documents that nanogpt and hash hold out"
    )
    max_document_bytes: Count = setting(0, "longer documents are rejected; 0: none", "bytes")
    block_tokens: Annotated[int, Field(gt=0, lt=2**31)] = setting(
        2**25, "a block has at most as many; documents are not cut", "tokens"
    )
    num_workers: Auto | Count = setting(
        "auto", "tasks at a time on Ray Data; auto: one per core; 0: this process, without Ray"
    )
    ray_address: str = setting("", "join this Ray cluster; empty: RAY_ADDRESS, else embedded Ray")


class PrepareSettings(Section):
    """`yuzogpt prepare`."""

    corpus: CorpusSettings = CorpusSettings()
    large: LargeCorpusSettings = LargeCorpusSettings()


class InspectedCorpus(Section):
    """A prepared corpus, and what to do with it."""

    data_dir: str = setting("", "the corpus's directory")
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")
    examples: Count = setting(3, "documents to print the beginning of")
    verify: bool = setting(False, "hash every block anew")
    export_bin: bool = setting(False, "write nanoGPT's train.bin and val.bin beside the blocks")


class InspectSettings(Section):
    """`yuzogpt inspect`."""

    inspect: InspectedCorpus = InspectedCorpus()


class ReportedRun(Section):
    """A run, and where its page goes."""

    out_dir: str = setting("", "the run's directory; it may be going on")
    html: str = setting("", "the page; empty: report.html in out_dir")
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")


class ReportSettings(Section):
    """`yuzogpt report`."""

    report: ReportedRun = ReportedRun()


class SamplingSettings(Section):
    """What is sampled, and how."""

    out_dir: str = setting("out", "the run to sample from: its best checkpoint")
    init_from: str = setting(
        "resume", "resume: out_dir; else gpt2, gpt2-medium, gpt2-large, gpt2-xl or a directory"
    )
    start: str = setting("\n", "the prompt, or FILE:path to read it from a file")
    prompts: str = setting(
        "", 'many prompts: a file with {"prompt": "..."} on each line, instead of start'
    )
    interactive: bool = setting(
        False, "each line of standard input is a prompt; one sample a line, as it comes"
    )
    num_samples: Positive = setting(10, "samples to draw, of each prompt")
    max_new_tokens: Positive = setting(500, "most tokens of each sample", "tokens")
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

    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of weights; auto: bfloat16 on GPUs that have it, else float32"
    )


class SampleSettings(Section):
    """`yuzogpt sample`."""

    sampling: SamplingSettings = SamplingSettings()
    device: SamplingDeviceSettings = SamplingDeviceSettings()


class SoundnessSettings(Section):
    """What is examined, and what a sound cluster must have."""

    ray_address: str = setting("", "the cluster; empty: RAY_ADDRESS, else this machine")
    num_nodes: Count = setting(0, "nodes that must be there, the head included; 0: any number")
    storage: str = setting("", "what all nodes share: a directory or URI; empty: not examined")
    least_bandwidth: NonNegative = setting(500.0, "between any two nodes", "Mbit/s")
    most_latency: NonNegative = setting(5.0, "between any two nodes, there and back", "ms")
    most_skew: NonNegative = setting(1.0, "of a node's clock", "s")
    least_storage_speed: NonNegative = setting(20.0, "writing to storage", "MB/s")
    least_disk: NonNegative = setting(
        5.0, "free in storage, and on each node for Ray's files", "GB"
    )
    least_memory: NonNegative = setting(2.0, "free on each node", "GB")
    output: Literal["table", "json"] = setting("table", "--json is short for --output=json")


class DoctorSettings(Section):
    """`yuzogpt doctor`."""

    doctor: SoundnessSettings = SoundnessSettings()


class ExportTarget(Section):
    """From a checkpoint to a folder that other programs load."""

    out_dir: str = setting("out", "the run (its best checkpoint) or checkpoint to export")
    to: Literal["huggingface"] = setting(
        "huggingface", "the format: what transformers, vLLM and lm-evaluation-harness load"
    )
    hf_dir: str = setting("hf", "the folder to write; must not exist")
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")


class ExportSettings(Section):
    """`yuzogpt export`."""

    export: ExportTarget = ExportTarget()
