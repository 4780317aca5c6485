"""The mean loss on a split, in nats per token, computed by all ranks.

The windows are fixed, non-overlapping, of block_size tokens. Only the loss over all windows of the
split is reported or compared as val loss; over some of them it is an estimate, and is named so.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from yuzogpt.data.batches import FixedWindows, Int64s
from yuzogpt.runtime.device import Hardware
from yuzogpt.runtime.world import World

STOP_CHECK_INTERVAL_S = 0.25  # between two collectives in which ranks agree whether to stop


class Interrupted(Exception):
    """An evaluation was asked to stop; raised on every rank after the same batch."""


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    windows: FixedWindows,
    indices: Int64s,
    batch_size: int,
    world: World,
    hardware: Hardware,
    on_progress: Callable[[], None] = lambda: None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> float:
    """Return the mean loss over the windows with these indices, the same on every rank.

    Each rank computes its share. Sums are in float64, so that the result hardly depends on how
    windows are batched or divided among ranks. Raises Interrupted on all ranks if one is asked to
    stop.
    """
    # Collectives need tensors on the device; Apple's has no float64, and no collectives.
    sum_device = torch.device("cpu") if hardware.device.type == "mps" else hardware.device
    total = torch.zeros(2, dtype=torch.float64, device=sum_device)
    was_training = model.training
    model.eval()
    batches, next_check, start = world.row_ranges(len(indices), batch_size), 1, time.perf_counter()
    for number, batch in enumerate(batches, start=1):
        tokens = torch.from_numpy(windows.read(indices[batch.start : batch.stop]))
        tokens = tokens.to(hardware.device)
        with hardware.autocast():
            losses = model(tokens[:, :-1], tokens[:, 1:])
        total[0] += losses.to(sum_device).sum(dtype=torch.float64)
        total[1] += losses.numel()
        on_progress()
        if number == next_check < len(batches):
            local = [is_asked_to_stop(), time.perf_counter() - start]
            asked, seconds = world.all_reduce_(torch.tensor(local, device=sum_device)).tolist()
            if asked:
                model.train(was_training)
                raise Interrupted
            in_interval = int(STOP_CHECK_INTERVAL_S * number * world.size / seconds)
            next_check += min(max(1, in_interval), number)  # later batches may take longer
    model.train(was_training)
    world.all_reduce_(total)
    return float(total[0] / total[1])
