"""Muon (Jordan et al., 2024): momentum whose matrices are made orthogonal before they are added.

In: the gradients of matrices, whole or sharded. Out: updates whose singular values are all near 1,
so that no direction of a layer learns faster than another. torch.optim.Muon orthogonalises what a
rank holds, which under FSDP is a slice of the matrix; here the slices are gathered first, and each
rank keeps its own part of the result.
"""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from yuzogpt.training.parallel import local, part_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: steep at 0, near 1 around 1
ITERATIONS = 5
EPSILON = 1e-7
AT_ONCE = 2**24  # elements that are gathered and orthogonalised together


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (N, rows, columns) with each singular value moved to within about 0.7 and 1.2.

    The Newton-Schulz iteration X <- aX + b(XX')X + c(XX')^2 X, which needs matrix products only;
    they are computed in `dtype`, of which bfloat16 is enough.
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

    Each group says into how many matrices of equal height its parameters are cut: queries, keys and
    values are stored as one, and are three.
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
            learning = [p for p in group["params"] if p.grad is not None]
            for _, parameters in groupby(sorted(learning, key=shape_of), key=shape_of):
                self._update(list(parameters), group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        lr, count = group["lr"], group["matrices"]
        height, width = parameters[0].shape
        # The update's size does not depend on a matrix's proportions (Bernstein, 2025).
        scale = max(1, height // count / width) ** 0.5
        many = max(1, AT_ONCE // parameters[0].numel())
        for first in range(0, len(parameters), many):
            some = parameters[first : first + many]
            whole = torch.stack([gathered(self._direction(p, group)) for p in some])
            cut = whole.view(len(some) * count, height // count, width)
            updates = orthogonalize(cut, self.dtype).reshape(whole.shape)
            for parameter, update in zip(some, updates, strict=True):
                own = local(parameter)
                own.mul_(1 - lr * group["weight_decay"])
                own.add_(part_of(update, parameter), alpha=-lr * scale)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Take the gradient into the moment; return where both point."""
        gradient, moment = parameter.grad, self.state[parameter]["momentum"]
        assert gradient is not None
        moment.lerp_(gradient, 1 - group["momentum"])
        return torch.lerp(gradient, moment, group["momentum"])


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a whole tensor."""
    return tuple(tensor.shape)


def gathered(tensor: Tensor) -> Tensor:
    """Return a whole tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
