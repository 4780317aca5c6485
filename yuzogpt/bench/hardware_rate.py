"""The two sides of MFU: a token's floating-point operations, and the device's measured rate."""

import statistics
import time

import torch

from yuzogpt.config import ModelSettings
from yuzogpt.model.shapes import count_layer
from yuzogpt.runtime.device import Hardware

MATRIX_WIDTHS = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # of square matrices
ROUNDS = 7


def flops_per_token(shape: ModelSettings) -> float:
    """Return the floating-point operations per token, forward and backward (PaLM, appendix B).

    Six per weight of a matrix product, and 12 n_layer n_embd T for attention, as if every token
    attended to all T. Recomputed activations are not counted.
    """
    multiplied = shape.n_layer * count_layer(shape) + shape.vocab_size * shape.n_embd
    return 6.0 * multiplied + 12.0 * shape.n_layer * shape.n_embd * shape.block_size


def matmul_rate(hardware: Hardware) -> float:
    """Return the operations per second of large matrix products, in the best round."""
    device, dtype = hardware.device, hardware.autocast_dtype or torch.float32
    width = MATRIX_WIDTHS.get(device.type, 2048)
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
    """Wait until the device has no work left."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def median_and_deciles(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the first and last decile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]
