"""How much of the device's arithmetic a step uses (MFU), against a rate that is measured here.

In: a shape, a device and a type. Out: floating-point operations: of a token, and of a second.
"""

import statistics
import time

import torch

from yuzogpt.config import ModelSettings
from yuzogpt.runtime.device import Hardware

WIDTHS = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # of the square matrices that are multiplied
ROUNDS = 7


def flops_per_token(shape: ModelSettings) -> float:
    """Return the operations of one token, forward and backward (PaLM, appendix B).

    Six for each weight that something is multiplied with, and 12 n_layer n_embd T for attention,
    as if all of T tokens were seen. What is computed again is not counted.
    """
    multiplied = shape.n_layer * shape.count_layer() + shape.vocab_size * shape.n_embd
    return 6.0 * multiplied + 12.0 * shape.n_layer * shape.n_embd * shape.block_size


def matrix_rate(hardware: Hardware) -> float:
    """Return how many operations a second the device makes in large products; the best round."""
    device, dtype = hardware.device, hardware.autocast_dtype or torch.float32
    width = WIDTHS.get(device.type, 2048)
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS + 1):
        synchronize(device)
        began = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2.0 * width**3 / min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait for what a device is still doing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return the median, and what a tenth of the values lies below and above."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]
