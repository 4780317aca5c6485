"""The GPT itself: its shape, its parts, and how its weights start."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from yuzogpt.config.section import Count, Fraction, NonNegative, Positive, Section, setting

# Shapes come from files of others, too: nobody's model is larger, and no product overflows.
Parts = Annotated[Positive, Field(le=2**14)]
Width = Annotated[Positive, Field(le=2**18)]
BaseWidth = Annotated[Count, Field(le=2**18)]
Context = Annotated[Positive, Field(le=2**24)]
Vocabulary = Annotated[Count, Field(le=2**31)]
Rounding = Annotated[Positive, Field(le=2**16)]


class ModelSettings(Section):
    """The shape of the GPT; what is not set is as in GPT-2, but for biases and dropout."""

    n_layer: Parts = setting(12, "transformer blocks", frozen=True)
    n_head: Parts = setting(12, "attention heads; divides n_embd", frozen=True)
    n_embd: Width = setting(768, "width of the residual stream", "channels", frozen=True)
    block_size: Context = setting(1024, "context length", "tokens", frozen=True)
    bias: bool = setting(False, "biases in linear layers and norms (GPT-2: True)", frozen=True)
    dropout: Fraction = setting(0.0, "dropout; 0 for pretraining, 0.1+ for finetuning", frozen=True)
    vocab_size: Vocabulary = setting(0, "0: taken from the corpus", "tokens", frozen=True)
    vocab_multiple: Rounding = setting(
        64, "embedding rows are padded to a multiple of this; padding is never sampled", frozen=True
    )
    pos_emb: Literal["learned", "rotary", "alibi"] = setting(
        "learned",
        "how tokens know where they stand; rotary and alibi go on past block_size",
        frozen=True,
    )
    norm: Literal["layer", "rms"] = setting("layer", "of what enters a layer's parts", frozen=True)
    activation: Literal["gelu", "relu2", "swiglu"] = setting(
        "gelu", "of the perceptrons; swiglu: three matrices of 2/3 the width", frozen=True
    )
    qk_norm: bool = setting(False, "norms of queries and keys are made equal", frozen=True)
    logit_softcap: NonNegative = setting(
        0.0, "no logit gets beyond it: cap * tanh(logit / cap); 0: no cap", frozen=True
    )
    tie_embeddings: bool = setting(
        True, "one matrix for embedding and output; False: the output's own", frozen=True
    )

    mup_base_width: BaseWidth = setting(
        0,
        "muP: the n_embd whose learning rates are to hold for this one; 0: no scaling",
        "channels",
        frozen=True,
    )

    @property
    def width_ratio(self) -> float:
        """How many times as wide as muP's base: 1 without muP."""
        return self.n_embd / (self.mup_base_width or self.n_embd)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def hidden_width(self) -> int:
        """Channels within a perceptron: 4 n_embd; of swiglu 8/3 n_embd, to a multiple of 8."""
        gated = -(-8 * self.n_embd // 24) * 8
        return gated if self.activation == "swiglu" else 4 * self.n_embd

    @property
    def is_extensible(self) -> bool:
        """Tell whether the model can see more than block_size tokens."""
        return self.pos_emb != "learned"

    def count_weights(self) -> int:
        """Count all weights, positions and padding included."""
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
        """Each head gets an equal share of the channels."""
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        width = self.n_embd // self.n_head
        if self.pos_emb == "rotary" and width % 2:
            raise ValueError(f"pos_emb=rotary turns pairs of channels, a head has {width}")
        return self


class InitializationSettings(Section):
    """How weights start (GPT-2's way, if nothing is set)."""

    init_std: Annotated[float, Field(gt=0)] = setting(
        0.02, "standard deviation of matrices and embeddings", frozen=True
    )
    residual_init: Literal["scaled", "plain", "zero"] = setting(
        "scaled",
        "matrices that end in the residual stream; scaled: init_std / sqrt(2 n_layer)",
        frozen=True,
    )
