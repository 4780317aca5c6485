"""The parts of a block besides attention: the MLP and the norms, with their variants.

All map (B, T, C) to (B, T, C); see gpt.py for shapes. Next: training/schedules.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.config.registry import Registry
from yuzogpt.model.dropout import Dropout

EPSILON = 1e-5  # of the norms; GPT-2's value


ACTIVATIONS = Registry[Callable[[Tensor], Tensor]]("activation", "is_gated")
NORMS = Registry[Callable[[ModelSettings], nn.Module]]("norm")


@ACTIVATIONS.register("gelu", help="GPT-2's")
def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of Hendrycks and Gimpel, 2016."""
    return F.gelu(x, approximate="tanh")


@ACTIVATIONS.register("relu2", help="relu(x)^2")
def relu2(x: Tensor) -> Tensor:
    """Primer (So et al., 2021)."""
    return F.relu(x).square()


@ACTIVATIONS.register("swiglu", help="three matrices of 2/3 the width", is_gated=True)
def swiglu(x: Tensor) -> Tensor:
    """Gate one half of c_fc's output by the other, through SiLU (Shazeer, 2020)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class MLP(nn.Module):
    """Two linear layers with an activation between; a gated one gets twice the width."""

    def __init__(self, settings: ModelSettings, site: int) -> None:
        """`site`: number of its dropout in the model."""
        super().__init__()
        C, is_gated = settings.n_embd, ACTIVATIONS.has(settings.activation, "is_gated")
        # With a third matrix, 8/3 C, rounded up to a multiple of 8, keeps the number of weights.
        hidden = -(-8 * C // 24) * 8 if is_gated else 4 * C
        self.activation = ACTIVATIONS[settings.activation]
        self.c_fc = nn.Linear(C, 2 * hidden if is_gated else hidden, bias=settings.bias)
        self.c_proj = nn.Linear(hidden, C, bias=settings.bias)
        self.drop = Dropout(settings.dropout, site)

    def forward(self, x: Tensor, row_keys: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.drop(self.c_proj(self.activation(self.c_fc(x))), row_keys)
        return out


class LayerNorm(nn.LayerNorm):
    """torch's layer norm (Ba et al., 2016), that also accepts bfloat16 weights with a float32 x."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        # FSDP gathers weights as bfloat16, which the CPU kernel does not accept with a float32 x.
        if x.dtype == torch.float32:
            weight, bias = weight.float(), None if bias is None else bias.float()
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


@NORMS.register("layer", help="LayerNorm")
def layer_norm(settings: ModelSettings) -> nn.Module:
    """Over the C channels; with a bias if linear layers have one."""
    return LayerNorm(settings.n_embd, EPSILON, bias=settings.bias)


@NORMS.register("rms", help="RMSNorm, without a bias")
def rms_norm(settings: ModelSettings) -> nn.Module:
    """Zhang and Sennrich, 2019."""
    return nn.RMSNorm(settings.n_embd, EPSILON)


def norm(settings: ModelSettings) -> nn.Module:
    """Return the norm that the settings name."""
    return NORMS[settings.norm](settings)
