"""The loss on a split, over all ranks.

In: a model and windows. Out: mean loss in nats a token. Over the whole split the windows are
fixed, non-overlapping, of block_size tokens: the only kind of val loss that is reported or
compared. Over some of them it is an estimate, and is named so.
"""

from collections.abc import Callable

import torch
from torch import nn

from yuzogpt.data.batches import FixedWindows, Int64s
from yuzogpt.hardware import Hardware
from yuzogpt.world import World


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    windows: FixedWindows,
    indices: Int64s,
    batch_size: int,
    world: World,
    hardware: Hardware,
    on_progress: Callable[[], None] = lambda: None,
) -> float:
    """Return the mean loss over the windows of these numbers, the same on every rank.

    Each rank reads its share. Sums are kept in float64, so that the result hardly depends on how
    windows are shared out or batched.
    """
    # Collectives want the device's own tensors; Apple's has no float64, and no collectives.
    place = torch.device("cpu") if hardware.device.type == "mps" else hardware.device
    total = torch.zeros(2, dtype=torch.float64, device=place)
    was_training = model.training
    model.eval()
    for batch in world.batches(len(indices), batch_size):
        tokens = torch.from_numpy(windows.read(indices[batch.start : batch.stop]))
        tokens = tokens.to(hardware.device)
        with hardware.autocasting():
            losses = model(tokens[:, :-1], tokens[:, 1:])
        total[0] += losses.to(place).sum(dtype=torch.float64)
        total[1] += losses.numel()
        on_progress()
    model.train(was_training)
    world.sum(total)
    return float(total[0] / total[1])
