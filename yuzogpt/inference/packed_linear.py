"""Weights as decoding reads them: packed for products with few rows.

Decoding reads every weight for each token, so bytes count. The arithmetic of few rows is far from
free, too, so the choice of kernels counts. On a CPU:

    float32     oneDNN's packed layout (a copy): 0.6 to 0.8 of the time of torch's products. A row's
                output is bit-identical at any batch size; where one row alone would differ, it is
                computed twice. With `packed=False`: `W @ x.T`, with W as it is stored, which
                processes can share by memory map
    bfloat16    weights rounded to bfloat16, arithmetic in float32. FBGEMM stores them as float16,
                which holds all bits of a bfloat16 from 6e-5 to 65504, and is off by 3e-8 below.
                Without FBGEMM: torch's bfloat16 products (slow on many CPUs)
    int8        8-bit weights with one scale per output; inputs are rounded to 7 bits of their row's
                largest value (FBGEMM's AVX2 arithmetic has room for no more)

(Torch's int8 weights with float32 inputs, _weight_int8pack_mm, were tried: 1.3 to 1.7 times slower
than bfloat16 on AVX2.) On GPUs torch's own products are used.

The operators of oneDNN and FBGEMM are no public interface of torch. If one is missing, torch's own
products are used; for int8 there are none, so that dtype is refused.
"""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yuzogpt.errors import UserError
from yuzogpt.model.gpt import GPT, TokenEmbedding
from yuzogpt.runtime.memory import use_huge_pages

FLOAT16_MAX = 65504.0
PACKED_BATCH_SIZE = 8  # what oneDNN packs for; 1 selects another kernel, with other last bits
ONEDNN_OPS = ("_reorder_linear_weight", "_linear_pointwise")
FP16_OPS = ("linear_prepack_fp16", "linear_dynamic_fp16")
INT8_OPS = ("linear_prepack", "linear_dynamic")


def pack_weights(model: GPT, dtype: torch.dtype, device: torch.device, packed: bool = True) -> GPT:
    """Replace a model's linear layers by those that decode fastest; it takes the model over."""
    if device.type != "cpu" or (dtype == torch.bfloat16 and not has_fbgemm(FP16_OPS)):
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
    """Resolve `auto`: bfloat16 on GPUs that support it, else float32."""
    if name == "int8":
        has_quantize = hasattr(torch, "quantize_per_channel")  # deprecated
        if device.type != "cpu" or not has_fbgemm(INT8_OPS) or not has_quantize:
            raise UserError("--dtype=int8: on CPUs with FBGEMM (x86) only; use --dtype=bfloat16")
        return torch.int8
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_bf16 else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def activation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type of activations, and of the KV cache."""
    if device.type != "cpu" or (dtype == torch.bfloat16 and not has_fbgemm(FP16_OPS)):
        return dtype
    return torch.float32


def has_onednn() -> bool:
    """Return True if torch has oneDNN's products with packed weights."""
    is_available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_available and all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN_OPS)


def has_fbgemm(ops: Sequence[str]) -> bool:
    """Return True if torch was built with FBGEMM and these operators, and this CPU can run it."""
    is_available = "fbgemm" in torch.backends.quantized.supported_engines
    return is_available and all(hasattr(torch.ops.quantized, name) for name in ops)


class PackedLinear(nn.Module):
    """A float32 linear layer, its weights in oneDNN's packed layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight`: (out, in)."""
        super().__init__()
        onednn = torch.ops.mkldnn
        self.weight = onednn._reorder_linear_weight(weight.contiguous(), PACKED_BATCH_SIZE)
        with contextlib.suppress(AttributeError, RuntimeError):  # missing in this torch
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
    """A float32 linear layer, its weights as they are stored."""

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
    """A linear layer with bfloat16 weights and float32 arithmetic."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight`: (out, in), rounded and packed here."""
        super().__init__()
        rounded = weight.bfloat16().float().clamp(-FLOAT16_MAX, FLOAT16_MAX)
        bias = None if bias is None else bias.detach().float()
        self.packed: Any = torch.ops.quantized.linear_prepack_fp16(rounded, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return out


class Int8Linear(nn.Module):
    """A linear layer with int8 weights; a row's output does not depend on the other rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight`: (out, in), rounded and packed here."""
        super().__init__()
        n_out, n_in = weight.shape
        scales = (weight.detach().abs().amax(dim=1).double() / 127).clamp(min=1e-12)
        zeros = torch.zeros(n_out, dtype=torch.long)
        with warnings.catch_warnings():  # torch deprecates these
            warnings.simplefilter("ignore")
            weight = weight.detach().float()
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed: Any = torch.ops.quantized.linear_prepack(rounded, None)
        self.bias = None if bias is None else bias.detach().float()
        # FBGEMM chooses one scale for all rows, by their smallest and largest values. So every row
        # is scaled to 1 before, and this extra row always holds both ends of the range.
        self.range = torch.zeros(1, n_in)
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
    """Tied embeddings: the token embedding, and the same matrix as output layer."""

    def __init__(self, embedding: TokenEmbedding, linear: LinearType) -> None:
        super().__init__()
        weight = embedding.weight.detach()
        self.weight = weight.bfloat16() if linear in (Fp16PackedLinear, Int8Linear) else weight
        self.output = linear(weight, None)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        return nn.functional.embedding(ids, self.weight).float()

    def project(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V)."""
        projected: Tensor = self.output(x)
        return projected
