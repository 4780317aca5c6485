"""Every private name of torch that training uses, each with a fallback where torch lacks it.

torch 2.10 to 2.13 have all of them. Nothing here is looked up while the module is imported, so a
torch without one of these names still runs every command.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def cpu_has_bfloat16() -> bool:
    """Return whether oneDNN has bfloat16 matrix products for this CPU.

    Elsewhere they are emulated, and many times slower than float32. Fallback: False, so float32.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def default_store() -> Any:
    """Return the store that connected the ranks. Fallback: None; then each watches itself."""
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    return find() if find else None


def vector_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each tensor: one kernel for all. Fallback: a call per tensor."""
    norms: Any = getattr(torch, "_foreach_norm", None)
    return list(norms(tensors)) if norms else [torch.linalg.vector_norm(t) for t in tensors]


def multiply_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply all tensors in place: one kernel for all. Fallback: a call per tensor."""
    if multiply := getattr(torch, "_foreach_mul_", None):
        multiply(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def subtract(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Return the differences: one kernel for all. Fallback: a call per tensor."""
    if difference := getattr(torch, "_foreach_sub", None):
        return list(difference(tensors, others))
    return [tensor - other for tensor, other in zip(tensors, others, strict=True)]
