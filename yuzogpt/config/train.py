"""`yuzogpt train`: a section for each part of a training run."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from yuzogpt.config.model import InitializationSettings, ModelSettings
from yuzogpt.config.schedule import ScheduleSettings
from yuzogpt.config.section import (
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
    span_of,
)


class DataSettings(Section):
    """Which prepared corpus is read."""

    dataset: Name = setting("shakespeare_char", "name of the prepared corpus")
    data_dir: str = setting(
        "", "its directory; empty: data/<dataset>", path="remote", if_empty="data/{dataset}"
    )


class OptimizerSettings(Section):
    """AdamW, as in nanoGPT; or Muon for the matrices of the layers, and AdamW for the rest."""

    optimizer: Literal["adamw", "muon"] = setting("adamw", "of the layers' matrices", frozen=True)
    learning_rate: NonNegative = setting(6e-4, "peak learning rate", frozen=True)
    matrix_lr_mult: NonNegative = setting(
        1.0, "learning rate of the layers' matrices, over the run's", frozen=True
    )
    embedding_lr_mult: NonNegative = setting(
        1.0, "that of the embeddings, over the run's", frozen=True
    )
    head_lr_mult: NonNegative = setting(
        1.0, "that of an untied output matrix, over the run's", frozen=True
    )
    weight_decay: NonNegative = setting(0.1, "on matrices only", frozen=True)
    beta1: Fraction = setting(0.9, "decay of AdamW's first moment", frozen=True)
    beta2: Fraction = setting(0.95, "decay of AdamW's second moment", frozen=True)
    momentum: Fraction = setting(0.95, "decay of Muon's moment", frozen=True)
    grad_clip: NonNegative = setting(1.0, "largest gradient norm; 0: no clipping", frozen=True)


class FinetuningSettings(Section):
    """What of a pretrained model learns, and how fast."""

    freeze_layers: Count = setting(
        0,
        "the first n layers and the embeddings (a tied output matrix, too) do not learn; 0: all do",
        "layers",
        frozen=True,
    )
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = setting(
        1.0,
        "each layer's learning rate over that of the one above; the embeddings' is the lowest",
        frozen=True,
    )


class BatchSettings(Section):
    """The global batch of one step: batch_size x gradient_accumulation_steps rows, on any world."""

    batch_size: Positive = setting(12, "most rows that one forward pass holds", "rows")
    gradient_accumulation_steps: Positive = setting(
        40, "the global batch is this many times batch_size; workers share it out", "micro-steps"
    )
    batch_schedule: Literal["constant", "linear", "steps", "noise"] = setting(
        "constant",
        "how the global batch grows to that; steps: it doubles; noise: as the gradient's noise "
        "scale, measured on the way, asks for",
        frozen=True,
    )
    batch_start_rows: Count = setting(
        0, "its first size, of which all are multiples; 0: the whole batch", "rows", frozen=True
    )
    batch_ramp_iters: Count = setting(
        0, "linear, steps: the batch is whole from this step on", "steps", frozen=True
    )
    lr_batch_exponent: NonNegative = setting(
        0.5,
        "a batch of a share s of the whole one learns with s^this of the learning rate",
        frozen=True,
    )

    @property
    def global_rows(self) -> int:
        """Rows in one optimizer step, over all workers; with a schedule, at its end."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def least_rows(self) -> int:
        """Rows in the smallest step."""
        return self.global_rows if self.batch_schedule == "constant" else self.batch_start_rows

    def rows_at(self, step: int) -> int:
        """Return the rows of the global batch of `step`.

        With start = batch_start_rows, end = batch_ramp_iters and n = global_rows / start:
        linear: start * floor(1 + (n - 1) * step / end). steps: log2(n) doublings, evenly spaced,
        the last at `end`. noise: start; later sizes depend on what the run measures.
        """
        if self.batch_schedule == "noise":
            return self.batch_start_rows
        if self.batch_schedule == "constant" or step >= self.batch_ramp_iters:
            return self.global_rows
        times = self.global_rows // self.batch_start_rows
        if self.batch_schedule == "linear":
            return self.batch_start_rows * (1 + (times - 1) * step // self.batch_ramp_iters)
        doublings = times.bit_length() - 1
        return self.batch_start_rows << (doublings * step // self.batch_ramp_iters)

    @model_validator(mode="after")
    def ramp_ends_at_whole_batch(self) -> Self:
        """A schedule has a first size that its last is a multiple of."""
        rows, first, kind = self.global_rows, self.batch_start_rows, self.batch_schedule
        if kind == "constant":
            return self
        if not first or rows % first:
            raise ValueError(
                f"batch_schedule={kind}: batch_start_rows={first} must divide the whole batch, "
                f"{rows}"
            )
        if kind == "steps" and (rows // first).bit_count() != 1:
            raise ValueError(
                f"batch_schedule=steps doubles: {rows} rows are not batch_start_rows={first} "
                "times 2, 4, 8, ..."
            )
        if kind != "noise" and not self.batch_ramp_iters:
            raise ValueError(f"batch_schedule={kind}: batch_ramp_iters says where it ends")
        return self


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
        "what of the val split is looked at: all, a half (sweeps search on the first), one window",
        frozen=True,
    )
    eval_tasks: Names = setting(
        (),
        "benchmarks for the checkpoint of each evaluation, beside the training: lambada, ...",
    )
    eval_tasks_limit: Count = setting(
        0, "only the first lines, passages or questions of each of them; 0: all"
    )
    benchmark_dir: str = setting(
        "",
        "where their files are; empty: the cache, filled from the web",
        path="local",
        if_empty="",
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

    max_nonfinite_steps: Positive = setting(
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
    wandb_key_file: str = setting(
        "", "file (mode 0600) with the W&B key; empty: wandb's own ways", path="here", if_empty=""
    )


class RunSettings(Section):
    """One run is one out_dir: the same command again resumes it."""

    out_dir: str = setting(
        "out", "everything that the run writes; s3://bucket/folder works, too", path="store"
    )
    init_from: str = setting(
        "scratch",
        "where weights start: scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a "
        "directory (run, checkpoint, Hugging Face folder)",
        frozen=True,
        path="model",
    )
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")
    overwrite: bool = setting(False, "delete the run in out_dir and start anew")
    seed: Seed = setting(1337, "of weights, order of data and dropout", frozen=True)


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
        25.0, "ddp averages gradients in buckets of this size; compiled, of 1 or more", "MiB"
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
    warm_spare_workers: bool = setting(
        True, "on embedded Ray, keep as many idle processes ready: a dead worker is replaced sooner"
    )
    hang_timeout_s: Annotated[float, Field(gt=0)] = setting(
        100.0, "workers that stand still for so long are named and started again", "seconds"
    )

    def span(self, auto: int) -> tuple[int, int]:
        """Return the least and the most workers; `auto`: how many that is."""
        return span_of(self.num_workers, auto)


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
