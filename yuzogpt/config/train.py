"""`yuzogpt train`: one section for each part of a training run."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from yuzogpt.config.batch import BatchSettings
from yuzogpt.config.model import InitializationSettings, ModelSettings
from yuzogpt.config.registry import TASKS, OneOf
from yuzogpt.config.schedule import ScheduleSettings
from yuzogpt.config.section import (
    RAY_ADDRESS,
    STORAGE,
    Auto,
    Count,
    DeviceSettings,
    Fraction,
    Name,
    Names,
    NonNegative,
    Part,
    Positive,
    Section,
    Seed,
    read_workers,
    setting,
    worker_range,
)


class DataSettings(Section):
    """Which prepared corpus is read."""

    dataset: Name = setting("shakespeare_char", "name of the prepared corpus")
    data_dir: str = setting(
        "", "its directory or URI; empty: data/<dataset>", path="remote", if_empty="data/{dataset}"
    )


class OptimizerSettings(Section):
    """AdamW, as in nanoGPT; or Muon for the layers' matrices and AdamW for the rest."""

    optimizer: Annotated[str, OneOf("yuzogpt.training.optimizers:OPTIMIZERS")] = setting(
        "adamw", "optimizer of the layers' matrices; all else always uses AdamW", frozen=True
    )
    learning_rate: NonNegative = setting(6e-4, "peak learning rate", frozen=True)
    matrix_lr_mult: NonNegative = setting(
        1.0, "learning-rate multiplier of the layers' matrices", frozen=True
    )
    embedding_lr_mult: NonNegative = setting(
        1.0, "learning-rate multiplier of the embeddings", frozen=True
    )
    head_lr_mult: NonNegative = setting(
        1.0, "learning-rate multiplier of the output matrix, if it is not tied", frozen=True
    )
    weight_decay: NonNegative = setting(0.1, "weight decay; applies to matrices only", frozen=True)
    beta1: Fraction = setting(0.9, "AdamW: decay rate of the first moment", frozen=True)
    beta2: Fraction = setting(0.95, "AdamW: decay rate of the second moment", frozen=True)
    momentum: Fraction = setting(0.95, "Muon: momentum", frozen=True)
    grad_clip: NonNegative = setting(
        1.0, "clip the gradient to this norm; 0: no clipping", frozen=True
    )


class FinetuningSettings(Section):
    """Which layers of a pretrained model are trained, and how fast."""

    freeze_layers: Count = setting(
        0,
        "freeze the first n layers and the embeddings (and with them a tied output matrix); 0: "
        "train all",
        "layers",
        frozen=True,
    )
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = setting(
        1.0,
        "multiply the learning rate by this per layer, from the last layer down to the "
        "embeddings; 1: the same for all",
        frozen=True,
    )


class EvaluationSettings(Section):
    """When and how the model is evaluated during training."""

    eval_interval: Positive = setting(
        2_000, "steps between evaluations, and between checkpoints", "steps"
    )
    eval_iters: Count = setting(
        200,
        "batches of evenly spaced windows that val_loss_estimate reads; 0: the whole val split",
        "batches",
    )
    eval_only: bool = setting(False, "evaluate on the whole val split and exit")
    val_part: Part = setting(
        "whole",
        "part of the val split to use: all, a half (sweeps search on the first) or one window",
        frozen=True,
    )
    eval_tasks: Annotated[Names, OneOf(TASKS)] = setting(
        (), "benchmarks to run on each evaluation's checkpoint while training continues"
    )
    eval_tasks_limit: Count = setting(
        0, "lines, passages or questions of each benchmark to use, from its start; 0: all"
    )
    benchmark_dir: str = setting(
        "",
        "directory with the benchmarks' files; empty: the cache, downloaded on first use",
        path="local",
    )


class CheckpointSettings(Section):
    """When checkpoints are written, and which are kept."""

    checkpoint_interval: Count = setting(
        0, "steps between checkpoints, besides those after evaluations; 0: none besides", "steps"
    )
    keep_last: Positive = setting(
        2, "newest checkpoints to keep, with optimizer state, to resume from", "checkpoints"
    )
    keep_best: Count = setting(1, "best checkpoints to keep, weights only", "checkpoints")


class GuardSettings(Section):
    """What happens when a step's loss or gradient is not finite, or spikes."""

    max_nonfinite_steps: Positive = setting(
        10,
        "end the run after this many steps in a row whose loss or gradient is not finite; each of "
        "them is skipped",
    )
    spike_sigmas: NonNegative = setting(
        6.0,
        "a loss this many standard deviations above its running mean is reported as a spike; 0: "
        "never",
        frozen=True,
    )
    skip_spikes: bool = setting(False, "also skip the optimizer step of a spike", frozen=True)


class LogSettings(Section):
    """What is logged, and where."""

    log_interval: Positive = setting(1, "steps between rows in metrics.jsonl", "steps")
    health_interval: Count = setting(
        100,
        "steps between records of each layer's gradient, weight and update norms; 0: never",
        "steps",
    )
    network_interval: Count = setting(
        1_000,
        "steps between measurements of the network between workers, starting at the first step; "
        "0: never",
        "steps",
    )
    loggers: Annotated[Names, OneOf("yuzogpt.training.loggers:LOGGERS")] = setting(
        (), "where records go besides metrics.jsonl, comma-separated"
    )
    wandb_log: bool = setting(False, "log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = setting("yuzogpt", "W&B project")
    wandb_run_name: str = setting("", "W&B run name; empty: the name of out_dir")
    wandb_key_file: str = setting(
        "",
        "file with the W&B key, mode 0600; empty: as wandb finds it (`wandb login`, WANDB_API_KEY)",
        path="here",
    )

    @property
    def all_loggers(self) -> tuple[str, ...]:
        """The loggers, with that of wandb_log."""
        return tuple(dict.fromkeys((*self.loggers, *(["wandb"] * self.wandb_log))))


class RunSettings(Section):
    """One run is one out_dir; the same command resumes it."""

    out_dir: str = setting(
        "out",
        "directory for everything that the run writes, or s3://bucket/folder; with --dataset=X: "
        "out-X",
        path="store",
    )
    init_from: str = setting(
        "scratch",
        "initial weights: scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a directory "
        "(run, checkpoint, Hugging Face folder)",
        frozen=True,
        path="model",
    )
    storage: str = setting("", STORAGE)
    overwrite: bool = setting(False, "delete the run in out_dir and start a new one")
    seed: Seed = setting(1337, "seed of initial weights, data order and dropout", frozen=True)


class TrainingDeviceSettings(DeviceSettings):
    """What training runs on."""

    compile: Auto | bool = setting("auto", "use torch.compile; auto: on CUDA only")
    autotune: Literal["cached", "now", "off"] = setting(
        "cached",
        "dtype=auto on CPUs; cached: measure float32, bfloat16 and kinds of attention, once per "
        "machine and shape; now: again; off: as `--dtype` says of auto",
    )


class ParallelSettings(Section):
    """How workers share one model."""

    parallel: Literal["auto", "ddp", "fsdp"] = setting(
        "auto",
        "ddp: each worker holds the whole model; fsdp: weights, gradients and optimizer state are "
        "sharded; auto: fsdp if ddp would fill more than half of a GPU",
    )
    activation_checkpointing: bool = setting(
        False,
        "recompute each layer's activations in the backward pass: less memory, about 1/3 more "
        "compute",
    )
    ddp_bucket_mb: Annotated[float, Field(gt=0)] = setting(
        25.0, "ddp: size of a gradient bucket; at least 1 if compiled", "MiB"
    )


class WorkerSettings(Section):
    """Where the training runs, and how it recovers."""

    num_workers: Annotated[int | str, BeforeValidator(read_workers)] = setting(
        "auto",
        "Ray Train workers; auto: one per GPU, or one; 1..4: as many as fit, changing while it "
        "runs; 0: train in this process, without Ray",
    )
    ray_address: str = setting("", RAY_ADDRESS)
    max_failures: Count = setting(
        3, "restarts after a worker crash, before the command fails", "restarts"
    )
    max_preemptions: Annotated[int, Field(ge=-1)] = setting(
        -1,
        "restarts after a node was preempted, counted apart from crashes; -1: no limit",
        "restarts",
    )
    warm_spare_workers: bool = setting(
        True, "embedded Ray: keep one idle process ready per worker, to replace a dead one faster"
    )
    hang_timeout_s: Annotated[float, Field(gt=0)] = setting(
        100.0, "restart all workers if one makes no progress for this long", "seconds"
    )

    def span(self, auto: int) -> tuple[int, int]:
        """Return the smallest and largest number of workers; `auto` stands for auto."""
        return worker_range(self.num_workers, auto)


class TrainSettings(Section):
    """`yuzogpt train`."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    initialization: InitializationSettings = InitializationSettings()
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
