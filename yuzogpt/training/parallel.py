"""The model as all ranks train it together: one copy each (DDP), or a part each (FSDP2).

In: a shape, and whole weights one after the other. Out: a `ParallelModel`: the model with its
weights on this rank, as it is trained. The model itself knows nothing of this.

    ddp     every rank holds weights, gradients and optimizer state; gradients are averaged
    fsdp    a rank holds some rows of each; a layer's weights are gathered when it is their turn
            (Zhao et al., 2023), gradients are averaged and scattered
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
from yuzogpt.runtime.device import Hardware, keep_compiled_code_private
from yuzogpt.runtime.memory import return_freed_memory
from yuzogpt.runtime.world import World
from yuzogpt.training.finetuning import freeze

FIRST_BUCKET_MB = 1.0  # of DDP, which keeps the first one small
BYTES_PER_WEIGHT = 16  # float32 weight, gradient and AdamW's two moments

Kind = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class ParallelModel:
    """A model in training: the weights on this rank, and what forward and backward go through."""

    model: GPT
    trained: nn.Module
    kind: Kind

    def averaging(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Return the context of a backward pass: DDP averages gradients in a step's last one only.

        FSDP does in each: whole gradients, kept between micro-steps, would be what it is to save.
        """
        if isinstance(self.trained, DistributedDataParallel) and not last:
            return self.trained.no_sync()
        return contextlib.nullcontext()

    def learning(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by name, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self) -> list[Tensor]:
        """Return what this rank holds of the gradient of each parameter that learns."""
        return [local(cast(Tensor, p.grad)) for p in self.learning().values()]

    def weights(self) -> list[Tensor]:
        """Return what this rank holds of each parameter that learns."""
        return [local(p.detach()) for p in self.learning().values()]

    @torch.no_grad()
    def load(self, tensors: NamedTensors) -> None:
        """Take this rank's part of each whole tensor."""
        if isinstance(self.trained, FSDPModule):
            self.trained.reshard()  # after an evaluation, embeddings are still gathered
        missing = {name for name, _ in self.model.named_parameters()}
        for name, whole in tensors:
            parameter = self.model.get_parameter(name)
            assert parameter.shape == whole.shape, f"{name}: {whole.shape}, not {parameter.shape}"
            local(parameter).copy_(part_of(whole, parameter))
            missing.remove(name)
        assert not missing, f"no weights for {sorted(missing)}"


def choose_kind(
    settings: ParallelSettings, world: World, device: torch.device, shape: ModelSettings
) -> tuple[Kind, str]:
    """Return how the ranks share a model of this shape, and why."""
    if world.size == 1:
        return "none", "one worker holds the model"
    if settings.parallel != "auto":
        return settings.parallel, f"{settings.parallel}, as asked"
    if device.type != "cuda":
        return "ddp", "ddp: it is the faster one, and memory is not a GPU's"
    # The smallest GPU decides, on all ranks.
    room = min(world.gather(torch.cuda.get_device_properties(device).total_memory))
    need = shape.count_weights() * BYTES_PER_WEIGHT
    kind: Kind = "fsdp" if need > room / 2 else "ddp"
    return kind, f"{kind}: ddp would take {need / 2**30:.1f} of {room / 2**30:.1f} GiB a GPU"


def parallelize(
    shape: ModelSettings,
    weights: NamedTensors,
    kind: Kind,
    settings: ParallelSettings,
    hardware: Hardware,
    frozen_layers: int = 0,
) -> ParallelModel:
    """Build the model, give each rank its part of `weights`, and connect the ranks."""
    with torch.device("meta"):  # no memory yet: under fsdp no rank ever holds all
        model = GPT(shape)
    freeze(model, frozen_layers)
    if settings.activation_checkpointing:
        recompute_layers(model)
    if hardware.compile:
        keep_compiled_code_private()
    if kind == "fsdp":
        shard(model, hardware)
    model.to_empty(device=hardware.device)
    trainee = ParallelModel(model, wrap(model, kind, settings, hardware), kind)
    trainee.load(weights)
    return trainee


def recompute_layers(model: GPT) -> None:
    """Keep no activations within a layer: backward computes them again (Chen et al., 2016).

    Dropout's masks come from the rows' keys, so they are the same again, without a random state.
    """
    for layer in model.h:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def shard(model: GPT, hardware: Hardware) -> None:
    """Shard each layer's weights over all ranks by rows, then embeddings and the last norm.

    Under autocast the layers' weights travel as bfloat16, which is what autocast makes of them
    anyway; gradients are summed in float32, and embeddings and the residual stream stay float32.
    """
    if hardware.device.type == "cpu":
        return_freed_memory()
    mesh = init_device_mesh(hardware.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=hardware.autocast, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # The losses are a view, which is only wrong if it is changed in place; the loop does not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for layer in model.h:
        if hardware.compile:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def wrap(model: GPT, kind: Kind, settings: ParallelSettings, hardware: Hardware) -> nn.Module:
    """Return what forward and backward go through: compiled if wanted, gradients averaged."""
    if kind == "fsdp":
        return model
    trained = cast(nn.Module, torch.compile(model)) if hardware.compile else model
    if kind == "none":
        return trained
    on_gpu = hardware.device.type == "cuda"
    bucket = settings.ddp_bucket_mb
    if hardware.compile:  # dynamo, which cuts the graph at buckets, wants none below the first
        bucket = max(bucket, FIRST_BUCKET_MB)
    return DistributedDataParallel(
        trained,
        device_ids=[hardware.device] if on_gpu else None,
        bucket_cap_mb=bucket,
        gradient_as_bucket_view=True,
    )


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank keeps, where `like` is kept."""
    if not isinstance(like, DTensor):
        return whole
    rows = rows_of_rank(len(whole), like.device_mesh.get_local_rank(), like.device_mesh.size())
    return whole[rows.start : rows.stop]


def rows_of_rank(rows: int, rank: int, size: int) -> range:
    """Return which rows of a sharded tensor a rank holds: equal parts, but for the last ones."""
    part = -(-rows // size)
    return range(min(rank * part, rows), min((rank + 1) * part, rows))


def warm_up_ddp_buckets(
    trained: nn.Module, hardware: Hardware, ids: Tensor, targets: Tensor, keys: Tensor
) -> None:
    """Let DDP fix the layout of its gradient buckets before the first step.

    After its first backward pass DDP regroups the buckets into the order in which gradients came,
    and gloo's order of summation follows the buckets. Without this pass, the first step after a
    resume would be summed otherwise than the same step of an undisturbed run.
    """
    if isinstance(trained, DistributedDataParallel):
        with hardware.autocasting():
            losses = trained(ids, targets, keys)
        losses.sum().backward()
        trained.zero_grad(set_to_none=True)
