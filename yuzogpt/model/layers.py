"""What a block is made of, besides attention: the perceptron and the norms, each in its variants.

In and out: (B, T, C). Shapes: see gpt.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.model.dropout import Dropout

EPSILON = 1e-5  # GPT-2's


class MLP(nn.Module):
    """Linear layers with a nonlinearity between.

    gelu     GPT-2's: the tanh approximation (Hendrycks and Gimpel, 2016)
    relu2    relu(x)^2 (Primer; So et al., 2021)
    swiglu   one half, through SiLU, opens and closes the other (Shazeer, 2020)
    """

    def __init__(self, settings: ModelSettings, site: int) -> None:
        """`site`: number of its dropout."""
        super().__init__()
        self.activation = settings.activation
        width = settings.hidden_width
        into = 2 * width if self.activation == "swiglu" else width
        self.c_fc = nn.Linear(settings.n_embd, into, bias=settings.bias)
        self.c_proj = nn.Linear(width, settings.n_embd, bias=settings.bias)
        self.drop = Dropout(settings.dropout, site)

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)
        if self.activation == "gelu":
            x = F.gelu(x, approximate="tanh")
        elif self.activation == "relu2":
            x = F.relu(x).square()
        else:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        out: Tensor = self.drop(self.c_proj(x), rows)
        return out


class LayerNorm(nn.Module):
    """Layer norm whose bias can be left out (Ba et al., 2016)."""

    def __init__(self, settings: ModelSettings) -> None:
        """Normalizes over the C channels."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(settings.n_embd))
        self.bias = nn.Parameter(torch.zeros(settings.n_embd)) if settings.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        # A CPU's kernel takes no rounded weights (fsdp's, with bfloat16) for an x that is not.
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if x.dtype == torch.float32:
            weight, bias = weight.float(), None if bias is None else bias.float()
        return F.layer_norm(x, weight.shape, weight, bias, EPSILON)


class RMSNorm(nn.Module):
    """Layer norm without its mean and bias (Zhang and Sennrich, 2019)."""

    def __init__(self, settings: ModelSettings) -> None:
        """Normalizes over the C channels."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(settings.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return F.rms_norm(x, self.weight.shape, self.weight, EPSILON)


def norm(settings: ModelSettings) -> nn.Module:
    """Return the norm that the settings name."""
    return LayerNorm(settings) if settings.norm == "layer" else RMSNorm(settings)
