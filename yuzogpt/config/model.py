"""The GPT: its shape, its parts, and its initial weights."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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
    pos_emb: Literal["learned", "rotary", "alibi"] = setting(
        "learned", "position encoding; rotary and alibi work beyond block_size", frozen=True
    )
    norm: Literal["layer", "rms"] = setting(
        "layer", "LayerNorm or RMSNorm, before attention and MLP", frozen=True
    )
    activation: Literal["gelu", "relu2", "swiglu"] = setting(
        "gelu", "activation of the MLP; swiglu has three matrices of 2/3 the width", frozen=True
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
    def hidden_width(self) -> int:
        """Width inside an MLP: 4 n_embd; swiglu: 8/3 n_embd, rounded up to a multiple of 8."""
        gated = -(-8 * self.n_embd // 24) * 8
        return gated if self.activation == "swiglu" else 4 * self.n_embd

    @property
    def is_extensible(self) -> bool:
        """Return whether the model can see more than block_size tokens."""
        return self.pos_emb != "learned"

    def count_weights(self) -> int:
        """Count all weights, including positions and padding."""
        C = self.n_embd
        embeddings = self.padded_vocab * C * (1 if self.tie_embeddings else 2)
        embeddings += self.block_size * C if self.pos_emb == "learned" else 0
        last_norm = C * (2 if self.bias and self.norm == "layer" else 1)
        return embeddings + last_norm + self.n_layer * self.count_layer()

    def count_layer(self) -> int:
        """Count the weights of a layer."""
        C, hidden = self.n_embd, self.hidden_width
        into = (2 if self.activation == "swiglu" else 1) * hidden
        weights = 4 * C * C + (into + hidden) * C + 2 * C
        if self.bias:
            weights += 5 * C + into + (2 * C if self.norm == "layer" else 0)
        return weights

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
