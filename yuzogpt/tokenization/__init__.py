"""Text to token ids and back: GPT-2's tokenizer, and one of single characters."""

from yuzogpt.tokenization.tokenizer import (
    CharTokenizer,
    describe,
    fingerprint,
    gpt2_tokenizer,
    id_dtype,
    load,
    to_bytes,
)
