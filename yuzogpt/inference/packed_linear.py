"""Weights as decoding reads them.

In: a model as it was loaded. Out: the same model, its matrices in the layout and type that few rows
are multiplied with fastest. Decoding reads every weight for each token, so bytes count; the
arithmetic of few rows is far from free, too, so kernels do. On a CPU:

    float32     oneDNN's own order (a copy): 0.6 to 0.8 of the time of torch's products, and a row
                comes out the same to the last bit in a batch of any size; where a row alone would
                not, it is computed twice. Or, `packed=False`, `W @ x.T` with W as it is stored,
                which processes may share by memory map
    bfloat16    weights rounded to bfloat16, arithmetic in float32. FBGEMM carries them as float16,
                which has a bfloat16's bits from 6e-5 to 65504, and is off by 3e-8 below; where
                it is missing, torch's bfloat16 products (slow on many CPUs)

    int8        weights of 8 bits, with a scale for each output; inputs are rounded to 7 bits of
                their row's largest value (FBGEMM's AVX2 arithmetic has room for no more)

(Torch's int8 weights with float32 inputs, _weight_int8pack_mm, were tried: 1.3 to 1.7 times slower
than bfloat16 on AVX2.) On GPUs torch's own products are used.
"""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from yuzogpt.errors import UserError
from yuzogpt.model.gpt import GPT, TokenEmbedding
from yuzogpt.runtime.memory import use_huge_pages

LARGEST_FLOAT16 = 65504.0
ROWS = 8  # what oneDNN's order is made for; with 1, another kernel with other last bits is taken


def pack_weights(model: GPT, dtype: torch.dtype, device: torch.device, packed: bool = True) -> GPT:
    """Turn a model for reading into one for decoding; it takes the model over."""
    if device.type != "cpu" or (dtype == torch.bfloat16 and not has_fbgemm()):
        return model.to(device, dtype)
    linear: LinearType = {torch.int8: Int8Linear}.get(dtype, Fp16PackedLinear)
    if dtype == torch.float32:
        linear = PackedLinear if packed and has_onednn() else UnpackedLinear
    for block in model.h:
        for part in (block.attn, block.mlp):
            assert isinstance(part, nn.Module)
            for name, child in part.named_children():
                if isinstance(child, nn.Linear):
                    part.add_module(name, linear(child.weight.detach(), child.bias))
    if model.lm_head is None:
        model.add_module("wte", DecodingEmbedding(model.wte, linear))
    else:
        model.add_module("lm_head", linear(model.lm_head.weight.detach(), None))
    return model


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bfloat16 on GPUs that have it, else float32."""
    if name == "int8":
        if device.type != "cpu" or not has_fbgemm():
            raise UserError("--dtype=int8: on CPUs with FBGEMM (x86) only; use --dtype=bfloat16")
        return torch.int8
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
        onednn = torch.ops.mkldnn
        self.weight = onednn._reorder_linear_weight(weight.contiguous(), ROWS)
        with contextlib.suppress(AttributeError, RuntimeError):  # of a torch without these
            use_huge_pages(onednn.data_ptr(self.weight), onednn._nbytes(self.weight))
        self.bias = None if bias is None else bias.detach()
        pair = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        self.pad_single_row = not torch.equal(self._product(pair[:1]), self._product(pair)[:1])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.pad_single_row and x.numel() == x.shape[-1]:
            row = x.view(1, -1)
            return self._product(row.expand(2, -1))[:1].view(*x.shape[:-1], -1)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class UnpackedLinear(nn.Module):
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


class Fp16PackedLinear(nn.Module):
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


class Int8Linear(nn.Module):
    """A linear layer of int8 weights; a row's output does not depend on the others."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight`: (out, in), rounded and packed here."""
        super().__init__()
        outs, ins = weight.shape
        scales = (weight.detach().abs().amax(dim=1).double() / 127).clamp(min=1e-12)
        zeros = torch.zeros(outs, dtype=torch.long)
        with warnings.catch_warnings():  # torch means to drop these in some later version
            warnings.simplefilter("ignore")
            weight = weight.detach().float()
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed: Any = torch.ops.quantized.linear_prepack(rounded, None)
        self.bias = None if bias is None else bias.detach().float()
        # FBGEMM chooses one scale for all rows, by their least and largest values. So rows are
        # scaled to 1 before, and this one sees to it that both are always there.
        self.range = torch.zeros(1, ins)
        self.range[0, :2] = torch.tensor([1.0, -1.0])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.flatten(0, -2)
        largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).clamp_(min=1e-12)
        scaled = torch.cat((rows / largest, self.range))
        out = torch.ops.quantized.linear_dynamic(scaled, self.packed, True)[:-1]
        out = out * largest if self.bias is None else torch.addcmul(self.bias, out, largest)
        return out.view(*x.shape[:-1], -1)


LinearType = type[PackedLinear] | type[UnpackedLinear] | type[Fp16PackedLinear] | type[Int8Linear]


class DecodingEmbedding(nn.Module):
    """The embedding, and the same matrix as output."""

    def __init__(self, embedding: TokenEmbedding, linear: LinearType) -> None:
        """`linear`: how the output is computed."""
        super().__init__()
        weight = embedding.weight.detach()
        self.weight = weight.bfloat16() if linear in (Fp16PackedLinear, Int8Linear) else weight
        self.output = linear(weight, None)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        return nn.functional.embedding(ids, self.weight).float()

    def project(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, rows of the matrix)."""
        projected: Tensor = self.output(x)
        return projected
