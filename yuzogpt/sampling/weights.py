"""Weights as decoding reads them.

In: a model as it was loaded. Out: the same model, its matrices in the layout and type that few rows
are multiplied with fastest. Decoding reads every weight for each token, so bytes count; the
arithmetic of few rows is far from free, too, so kernels do. On a CPU:

    float32     oneDNN's own order (a copy): 0.6 to 0.8 of the time of torch's products, and a row
                comes out the same to the last bit in a batch of any size. Or, `packed=False`,
                `W @ x.T` with W as it is stored, which processes may share by memory map
    bfloat16    weights rounded to bfloat16, arithmetic in float32. FBGEMM carries them as float16,
                which has a bfloat16's bits from 6e-5 to 65504, and is off by 3e-8 below; where
                it is missing, torch's bfloat16 products (slow on many CPUs)

Weights of 8 bits were tried (torch's _weight_int8pack_mm): 1.3 to 1.7 times slower than those 16
bits on AVX2, since arithmetic, not memory, is the limit there. On GPUs torch's own products are
used.
"""

from typing import Any

import torch
from torch import Tensor, nn

from yuzogpt.model.gpt import GPT, TokenEmbedding

LARGEST_FLOAT16 = 65504.0
ROWS = 8  # what oneDNN's order is made for; with 1, another kernel with other last bits is taken


def lay_out(model: GPT, dtype: torch.dtype, device: torch.device, packed: bool = True) -> GPT:
    """Turn a model for reading into one for decoding; it takes the model over."""
    if device.type != "cpu" or (dtype == torch.bfloat16 and not has_fbgemm()):
        return model.to(device, dtype)
    linear: LinearType = HalfLinear
    if dtype == torch.float32:
        linear = PackedLinear if packed and has_onednn() else StoredLinear
    for block in model.h:
        for part in (block.attn, block.mlp):
            assert isinstance(part, nn.Module)
            for name, child in part.named_children():
                if isinstance(child, nn.Linear):
                    part.add_module(name, linear(child.weight.detach(), child.bias))
    model.add_module("wte", DecodingEmbedding(model.wte, linear))
    return model


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bfloat16 on GPUs that have it, else float32."""
    if name == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_it else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def activations(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type of activations, and of the cache."""
    return torch.float32 if device.type == "cpu" and has_fbgemm() else dtype


def has_onednn() -> bool:
    """Tell whether torch has oneDNN's products with packed weights."""
    return torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_reorder_linear_weight"
    )


def has_fbgemm() -> bool:
    """Tell whether torch was built with FBGEMM, and this CPU can run it."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class PackedLinear(nn.Module):
    """A linear layer of float32, its weights in oneDNN's order."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight`: (out, in)."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class StoredLinear(nn.Module):
    """A linear layer of float32, its weights as they are stored."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight`: (out, in), shared with the model it comes from."""
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else bias.detach()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        columns = x.flatten(0, -2).t()
        if self.bias is None:
            out = self.weight @ columns
        else:
            out = torch.addmm(self.bias, self.weight, columns)
        return out.t().contiguous().view(*x.shape[:-1], -1)


class HalfLinear(nn.Module):
    """A linear layer of bfloat16 weights and float32 arithmetic."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight`: (out, in), rounded and packed here."""
        super().__init__()
        rounded = weight.bfloat16().float().clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
        added = None if bias is None else bias.detach().float()
        self.packed: Any = torch.ops.quantized.linear_prepack_fp16(rounded, added)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return out


LinearType = type[PackedLinear] | type[StoredLinear] | type[HalfLinear]


class DecodingEmbedding(nn.Module):
    """The embedding, and the same matrix as output."""

    def __init__(self, embedding: TokenEmbedding, linear: LinearType) -> None:
        """`linear`: how the output is computed."""
        super().__init__()
        weight = embedding.weight.detach()
        self.weight = weight.bfloat16() if linear is HalfLinear else weight
        self.output = linear(weight, None)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        return nn.functional.embedding(ids, self.weight).float()

    def project(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, rows of the matrix)."""
        projected: Tensor = self.output(x)
        return projected
