"""Data parallelism: each rank holds the whole model (DDP), or a shard of it (FSDP2).

The model itself knows nothing of this.

    ddp     every rank holds weights, gradients and optimizer state; gradients are averaged
    fsdp    a rank holds some rows of each; a layer's weights are gathered when they are needed
            (Zhao et al., 2023); gradients are averaged and scattered
"""

import contextlib
import functools
import warnings
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from yuzogpt.checkpoints.load import NamedTensors
from yuzogpt.config import ModelSettings, ParallelSettings
from yuzogpt.model.gpt import GPT
from yuzogpt.model.shapes import count_weights
from yuzogpt.runtime.device import Hardware, keep_compiled_code_private
from yuzogpt.runtime.memory import return_freed_memory
from yuzogpt.runtime.world import World
from yuzogpt.training.finetuning import freeze

FIRST_BUCKET_MB = 1.0  # DDP's default for its first bucket
BYTES_PER_WEIGHT = 16  # float32 weight, gradient and AdamW's two moments

Kind = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class ParallelModel:
    """A model in training, and the DDP or FSDP wrapper that forward and backward go through."""

    gpt: GPT  # with this rank's weights
    wrapped: nn.Module
    kind: Kind

    def sync_gradients(self, *, is_last: bool) -> contextlib.AbstractContextManager[object]:
        """Return the context of a micro-step; DDP averages gradients over ranks in the last only.

        FSDP averages in each: unsharded gradients between micro-steps would take the memory that
        FSDP is to save.
        """
        if isinstance(self.wrapped, DistributedDataParallel) and not is_last:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not frozen, by name, in the model's order."""
        return {name: p for name, p in self.gpt.named_parameters() if p.requires_grad}

    def gradients(self) -> list[Tensor]:
        """Return this rank's part of each trainable parameter's gradient."""
        return [to_local(cast(Tensor, p.grad)) for p in self.trainable_parameters().values()]

    def weights(self) -> list[Tensor]:
        """Return this rank's part of each trainable parameter."""
        return [to_local(p.detach()) for p in self.trainable_parameters().values()]

    @torch.no_grad()
    def load(self, tensors: NamedTensors) -> None:
        """Copy this rank's part of each whole tensor into the model."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.reshard()  # embeddings stay gathered after an evaluation
        missing = {name for name, _ in self.gpt.named_parameters()}
        for name, whole in tensors:
            parameter = self.gpt.get_parameter(name)
            assert parameter.shape == whole.shape, f"{name}: {whole.shape}, not {parameter.shape}"
            to_local(parameter).copy_(shard_like(whole, parameter))
            missing.remove(name)
        assert not missing, f"no weights for {sorted(missing)}"


def choose_kind(
    settings: ParallelSettings, world: World, device: torch.device, shape: ModelSettings
) -> tuple[Kind, str]:
    """Return the kind of parallelism for a model of this shape, and the reason for it."""
    if world.size == 1:
        return "none", "one worker holds the model"
    if settings.parallel != "auto":
        return settings.parallel, f"{settings.parallel}, as asked"
    if device.type != "cuda":
        return "ddp", "ddp: it is faster than fsdp, and main memory is not scarce"
    # The smallest GPU decides for all ranks.
    memory = min(world.gather(torch.cuda.get_device_properties(device).total_memory))
    need = count_weights(shape) * BYTES_PER_WEIGHT
    kind: Kind = "fsdp" if need > memory / 2 else "ddp"
    return kind, f"{kind}: ddp would take {need / 2**30:.1f} of {memory / 2**30:.1f} GiB per GPU"


def parallelize(
    shape: ModelSettings,
    weights: NamedTensors,
    kind: Kind,
    settings: ParallelSettings,
    hardware: Hardware,
    frozen_layers: int = 0,
) -> ParallelModel:
    """Build the model, load this rank's part of `weights`, and connect the ranks."""
    with torch.device("meta"):  # no memory yet: under fsdp, no rank ever holds the whole model
        model = GPT(shape)
    freeze(model, frozen_layers)
    if settings.activation_checkpointing:
        recompute_layers(model)
    if hardware.compile:
        keep_compiled_code_private()
    if kind == "fsdp":
        shard(model, hardware)
    model.to_empty(device=hardware.device)
    parallel_model = ParallelModel(model, wrap(model, kind, settings, hardware), kind)
    parallel_model.load(weights)
    return parallel_model


def recompute_layers(model: GPT) -> None:
    """Recompute the activations of each layer in the backward pass (Chen et al., 2016).

    Dropout masks derive from the rows' keys, so no random state has to be kept for that.
    """
    for layer in model.h:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def shard(model: GPT, hardware: Hardware) -> None:
    """Shard each layer's weights over all ranks by rows, then embeddings and the last norm.

    Under autocast, the layers' weights are gathered as bfloat16, to which autocast would convert
    them anyway; gradients are summed in float32, and embeddings and the residual stream stay
    float32.
    """
    if hardware.device.type == "cpu":
        return_freed_memory()
    mesh = init_device_mesh(hardware.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=hardware.autocast_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # The losses are a view; that is harmless, as the loop does not change them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for layer in model.h:
        if hardware.compile:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def wrap(model: GPT, kind: Kind, settings: ParallelSettings, hardware: Hardware) -> nn.Module:
    """Return the model to train: compiled if wanted, and under DDP if so chosen."""
    if kind == "fsdp":
        return model
    compiled = cast(nn.Module, torch.compile(model)) if hardware.compile else model
    if kind == "none":
        return compiled
    on_gpu = hardware.device.type == "cuda"
    bucket = settings.ddp_bucket_mb
    if hardware.compile:  # dynamo splits the graph at buckets, and takes none below the first
        bucket = max(bucket, FIRST_BUCKET_MB)
    return DistributedDataParallel(
        compiled,
        device_ids=[hardware.device] if on_gpu else None,
        bucket_cap_mb=bucket,
        gradient_as_bucket_view=True,
    )


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor: all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank holds, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    rows = shard_rows(len(whole), like.device_mesh.get_local_rank(), like.device_mesh.size())
    return whole[rows.start : rows.stop]


def shard_rows(rows: int, rank: int, size: int) -> range:
    """Return the rows of a sharded tensor that a rank holds: equal parts except the last."""
    part = -(-rows // size)
    return range(min(rank * part, rows), min((rank + 1) * part, rows))


def warm_up_ddp_buckets(
    wrapped: nn.Module, hardware: Hardware, ids: Tensor, targets: Tensor, keys: Tensor
) -> None:
    """Let DDP fix the layout of its gradient buckets before the first step.

    After its first backward pass, DDP regroups the buckets in the order in which gradients came,
    and gloo's order of summation follows the buckets. Without this dummy pass, the first step
    after a resume would sum in another order than the same step of an uninterrupted run.
    """
    if isinstance(wrapped, DistributedDataParallel):
        with hardware.autocast():
            losses = wrapped(ids, targets, keys)
        losses.sum().backward()
        wrapped.zero_grad(set_to_none=True)
