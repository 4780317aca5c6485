"""The GPT: its shape, its parts, and its initial weights."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from yuzogpt.config.registry import OneOf, has_trait
from yuzogpt.config.section import Count, Fraction, NonNegative, Positive, Section, setting

# Shapes also come from other people's files. No real model is larger, and no product overflows.
Parts = Annotated[Positive, Field(le=2**14)]
Width = Annotated[Positive, Field(le=2**18)]
BaseWidth = Annotated[Count, Field(le=2**18)]
Context = Annotated[Positive, Field(le=2**24)]
Vocabulary = Annotated[Count, Field(le=2**31)]
Rounding = Annotated[Positive, Field(le=2**16)]


class ModelSettings(Section):
    """The shape of the GPT. Defaults are GPT-2's, but without biases and dropout."""

    n_layer: Parts = setting(12, "number of layers (transformer blocks)", frozen=True)
    n_head: Parts = setting(12, "attention heads; must divide n_embd", frozen=True)
    n_embd: Width = setting(768, "width of the residual stream", "channels", frozen=True)
    block_size: Context = setting(1024, "context length", "tokens", frozen=True)
    bias: bool = setting(False, "biases in linear layers and norms (GPT-2: True)", frozen=True)
    dropout: Fraction = setting(
        0.0, "dropout probability; 0 for pretraining, 0.1 or more for finetuning", frozen=True
    )
    vocab_size: Vocabulary = setting(0, "vocabulary size; 0: the corpus's", "tokens", frozen=True)
    vocab_multiple: Rounding = setting(
        64,
        "pad the embedding to a multiple of this many rows; padding is never sampled",
        frozen=True,
    )
    pos_emb: Annotated[str, OneOf("yuzogpt.model.positions:POSITION_KINDS")] = setting(
        "learned", "position encoding", frozen=True
    )
    norm: Annotated[str, OneOf("yuzogpt.model.layers:NORMS")] = setting(
        "layer", "norm before attention and MLP", frozen=True
    )
    activation: Annotated[str, OneOf("yuzogpt.model.layers:ACTIVATIONS")] = setting(
        "gelu", "activation of the MLP", frozen=True
    )
    qk_norm: bool = setting(
        False, "apply RMSNorm, without weights, to queries and keys", frozen=True
    )
    logit_softcap: NonNegative = setting(
        0.0, "cap logits smoothly: cap * tanh(logit / cap); 0: no cap", frozen=True
    )
    tie_embeddings: bool = setting(
        True, "share one matrix between embedding and output; False: two matrices", frozen=True
    )

    mup_base_width: BaseWidth = setting(
        0,
        "muP: n_embd of the model that the learning rates were tuned on; 0: no muP scaling",
        "channels",
        frozen=True,
    )

    @property
    def width_ratio(self) -> float:
        """n_embd over muP's base width; 1 without muP."""
        return self.n_embd / (self.mup_base_width or self.n_embd)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding matrix."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def is_extensible(self) -> bool:
        """Return whether the model can see more than block_size tokens."""
        return not has_trait(self, "pos_emb", "is_bounded")

    @property
    def matrix_weights(self) -> int:
        """All weights but those of biases and norms; model/shapes.py counts every one."""
        C = self.n_embd
        tables = self.padded_vocab * (1 if self.tie_embeddings else 2)
        tables += 0 if self.is_extensible else self.block_size
        return tables * C + 12 * self.n_layer * C * C  # attention has 4 C^2, an MLP 8 C^2

    @model_validator(mode="after")
    def heads_divide_width(self) -> Self:
        """Heads share the channels equally; rotary rotates pairs of channels."""
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        width = self.n_embd // self.n_head
        if self.pos_emb == "rotary" and width % 2:
            raise ValueError(f"pos_emb=rotary needs an even head size; n_embd / n_head = {width}")
        return self


class InitializationSettings(Section):
    """Initial weights. Defaults are GPT-2's."""

    init_std: Annotated[float, Field(gt=0)] = setting(
        0.02, "standard deviation of matrices and embeddings", frozen=True
    )
    residual_init: Literal["scaled", "plain", "zero"] = setting(
        "scaled",
        "matrices that write to the residual stream; scaled: std init_std / sqrt(2 n_layer); "
        "plain: std init_std; zero: zeros",
        frozen=True,
    )
