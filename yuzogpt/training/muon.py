"""Muon (Jordan et al., 2024): SGD with momentum whose update matrices are orthogonalised.

All singular values of an update are near 1, so that no direction of a layer learns faster than
another. torch.optim.Muon orthogonalises the part that a rank holds, which under FSDP is a slice of
the matrix, and treats queries, keys and values as one matrix. Here slices are gathered first, and
each rank keeps its part of the result.
"""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from yuzogpt.training.parallel import shard_like, to_local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: steep at 0, near 1 around 1
ITERATIONS = 5
EPSILON = 1e-7
BATCH_ELEMENTS = 2**24  # gathered and orthogonalised together


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return matrices, (N, rows, columns), with singular values moved to about 0.7 to 1.2.

    The Newton-Schulz iteration X <- aX + b(XX')X + c(XX')^2 X needs matrix products only. They are
    computed in `dtype`; bfloat16 is precise enough.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # so that XX' is the smaller square
    x = x.to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum and decoupled weight decay, for matrices.

    Each group says into how many matrices of equal height its parameters are split: queries, keys
    and values are stored as one parameter, and are three matrices.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Groups have `params`, `weight_decay` and `matrices`; `dtype`: of matrix products."""
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix."""
        assert closure is None
        for group in self.param_groups:
            trainable = [p for p in group["params"] if p.grad is not None]
            for _, parameters in groupby(sorted(trainable, key=whole_shape), key=whole_shape):
                self._update(list(parameters), group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        lr, count = group["lr"], group["matrices"]
        height, width = parameters[0].shape
        # The update's size does not depend on a matrix's proportions (Bernstein, 2025).
        scale = max(1, height // count / width) ** 0.5
        per_batch = max(1, BATCH_ELEMENTS // parameters[0].numel())
        for first in range(0, len(parameters), per_batch):
            batch = parameters[first : first + per_batch]
            whole = torch.stack([gather(self._direction(p, group)) for p in batch])
            matrices = whole.view(len(batch) * count, height // count, width)
            updates = orthogonalize(matrices, self.dtype).reshape(whole.shape)
            for parameter, update in zip(batch, updates, strict=True):
                shard = to_local(parameter)
                shard.mul_(1 - lr * group["weight_decay"])
                shard.add_(shard_like(update, parameter), alpha=-lr * scale)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Update the momentum; return the direction of the step (Nesterov)."""
        gradient, moment = parameter.grad, self.state[parameter]["momentum"]
        assert gradient is not None
        moment.lerp_(gradient, 1 - group["momentum"])
        return torch.lerp(gradient, moment, group["momentum"])


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole tensor."""
    return tuple(tensor.shape)


def gather(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
