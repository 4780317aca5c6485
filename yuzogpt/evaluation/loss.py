"""The loss on a split, over all ranks.

In: a model and windows. Out: mean loss in nats a token. Over the whole split the windows are
fixed, non-overlapping, of block_size tokens: the only kind of val loss that is reported or
compared. Over some of them it is an estimate, and is named so.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from yuzogpt.data.batches import FixedWindows, Int64s
from yuzogpt.runtime.device import Hardware
from yuzogpt.runtime.world import World

ASK_EVERY = 0.25  # seconds, between two times that the ranks ask each other whether to stop


class Interrupted(Exception):
    """An evaluation that was asked to stop, on every rank at the same place."""


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
    """Return the mean loss over the windows of these numbers, the same on every rank.

    Each rank reads its share. Sums are kept in float64, so that the result hardly depends on how
    windows are shared out or batched. Interrupted, on all ranks, if one is asked to stop.
    """
    # Collectives want the device's own tensors; Apple's has no float64, and no collectives.
    place = torch.device("cpu") if hardware.device.type == "mps" else hardware.device
    total = torch.zeros(2, dtype=torch.float64, device=place)
    was_training = model.training
    model.eval()
    batches, asks_after, began = world.batches(len(indices), batch_size), 1, time.perf_counter()
    for number, batch in enumerate(batches, start=1):
        tokens = torch.from_numpy(windows.read(indices[batch.start : batch.stop]))
        tokens = tokens.to(hardware.device)
        with hardware.autocast():
            losses = model(tokens[:, :-1], tokens[:, 1:])
        total[0] += losses.to(place).sum(dtype=torch.float64)
        total[1] += losses.numel()
        on_progress()
        if number == asks_after < len(batches):
            told = [is_asked_to_stop(), time.perf_counter() - began]
            asked, seconds = world.all_reduce_(torch.tensor(told, device=place)).tolist()
            if asked:
                model.train(was_training)
                raise Interrupted
            in_time = int(ASK_EVERY * number * world.size / seconds)
            asks_after += min(max(1, in_time), number)  # later batches may take longer
    model.train(was_training)
    world.all_reduce_(total)
    return float(total[0] / total[1])
