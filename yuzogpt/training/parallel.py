"""The model as all ranks train it together: compiled, and its gradients averaged.

In: the plain model. Out: the same model, wrapped. The model itself knows nothing of this.
"""

import contextlib
import datetime
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from yuzogpt.config import WorkerSettings
from yuzogpt.hardware import Hardware, choose_device
from yuzogpt.world import World

# Rank 0 writes checkpoints while the others wait; a large one on slow storage takes minutes.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def parallelize(
    model: nn.Module, world: World, hardware: Hardware, settings: WorkerSettings
) -> nn.Module:
    """Return the model as all ranks train it: compiled if wanted, gradients averaged by DDP."""
    trained = cast(nn.Module, torch.compile(model)) if hardware.compile else model
    if world.size == 1:
        return trained
    on_gpu = hardware.device.type == "cuda"
    return DistributedDataParallel(
        trained,
        device_ids=[hardware.device] if on_gpu else None,
        bucket_cap_mb=settings.ddp_bucket_mb,
        gradient_as_bucket_view=True,
    )


def averaging(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Return the context of a backward pass: gradients are averaged in a step's last one only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def process_group(world: World, device: str) -> Iterator[None]:
    """Connect the workers that torchrun started; Ray Train does this itself."""
    if world.size == 1:
        yield
        return
    # Before the first collective, or all ranks of a node would take the first GPU.
    on_gpu = choose_device(device, world).type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def settle_buckets(
    model: nn.Module, hardware: Hardware, ids: Tensor, targets: Tensor, keys: Tensor
) -> None:
    """Let DDP fix the layout of its gradient buckets before the first step.

    After its first backward pass DDP regroups the buckets into the order in which gradients came,
    and gloo's order of summation follows the buckets. Without this pass, the first step after a
    resume would be summed otherwise than the same step of an undisturbed run.
    """
    if isinstance(model, DistributedDataParallel):
        with hardware.autocasting():
            losses = model(ids, targets, keys)
        losses.sum().backward()
        model.zero_grad(set_to_none=True)
