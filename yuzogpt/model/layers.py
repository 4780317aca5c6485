"""The parts of a block besides attention: the MLP and the norms, with their variants.

All map (B, T, C) to (B, T, C); see gpt.py for shapes. Next: training/schedules.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuzogpt.config import ModelSettings
from yuzogpt.model.dropout import Dropout

EPSILON = 1e-5  # of the norms, as GPT-2's


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between.

    gelu     GPT-2's: the tanh approximation (Hendrycks and Gimpel, 2016)
    relu2    relu(x)^2 (Primer; So et al., 2021)
    swiglu   one half of c_fc's output, through SiLU, gates the other half (Shazeer, 2020)
    """

    def __init__(self, settings: ModelSettings, site: int) -> None:
        """`site`: number of its dropout in the model."""
        super().__init__()
        self.activation = settings.activation
        hidden = settings.hidden_width
        width = 2 * hidden if self.activation == "swiglu" else hidden
        self.c_fc = nn.Linear(settings.n_embd, width, bias=settings.bias)
        self.c_proj = nn.Linear(hidden, settings.n_embd, bias=settings.bias)
        self.drop = Dropout(settings.dropout, site)

    def forward(self, x: Tensor, row_keys: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)
        if self.activation == "gelu":
            x = F.gelu(x, approximate="tanh")
        elif self.activation == "relu2":
            x = F.relu(x).square()
        else:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        out: Tensor = self.drop(self.c_proj(x), row_keys)
        return out


class LayerNorm(nn.LayerNorm):
    """torch's layer norm (Ba et al., 2016), which here takes bfloat16 weights with a float32 x."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        # FSDP gathers weights as bfloat16, which the CPU kernel does not accept with a float32 x.
        if x.dtype == torch.float32:
            weight, bias = weight.float(), None if bias is None else bias.float()
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def norm(settings: ModelSettings) -> nn.Module:
    """Return the norm that the settings name, over the C channels."""
    if settings.norm == "layer":
        return LayerNorm(settings.n_embd, EPSILON, bias=settings.bias)
    return nn.RMSNorm(settings.n_embd, EPSILON)  # Zhang and Sennrich, 2019
