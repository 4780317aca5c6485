"""A Hugging Face folder speaks its own tokenizer, or it is refused by name; never another's."""

import json
import random

import pytest
from transformers import AutoTokenizer

from yuzogpt.checkpoints.resolve import resolve_model
from yuzogpt.errors import UserError
from yuzogpt.storage.untrusted import DamagedFile
from yuzogpt.tokenization import huggingface
from yuzogpt.tokenization.tokenizer import CharTokenizer, byte_pair_tokenizer, gpt2_tokenizer

TEXT = "¿Qué tal? The year's 2026;\n\n  indented\ttext, año tras año.<|endoftext|>"


def folder_of(tmp_path, vocab_size, files):
    """A folder as far as its tokenizer is asked for: config.json and the tokenizer's files."""
    shape = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": vocab_size}
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def another_bpe():
    """A tokenizer as large as GPT-2's with other merges, as another language has."""
    generator = random.Random(0)
    ranks = {bytes([byte]): index for index, byte in enumerate(generator.sample(range(256), 256))}
    tokens = list(ranks)
    while len(ranks) < 50_256:
        merged = generator.choice(tokens[:3000]) + bytes([generator.randrange(256)])
        if merged not in ranks and len(merged) < 8:
            ranks[merged] = len(ranks)
            tokens.append(merged)
    return byte_pair_tokenizer(ranks, "here")


@pytest.mark.slow
@pytest.mark.parametrize("left", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_a_bpe_of_its_own_is_used_though_it_is_as_large_as_gpt2s(tmp_path, left):
    own = another_bpe()
    files = huggingface.to_files(own, 16)
    folder = folder_of(tmp_path, 50_257, {name: files[name] for name in left})
    found = resolve_model(str(folder)).tokenizer()
    assert found.to_dict() == own.to_dict()
    expected = AutoTokenizer.from_pretrained(folder)(TEXT, split_special_tokens=True)["input_ids"]
    assert found.encode(TEXT).tolist() == expected
    assert expected != gpt2_tokenizer().encode(TEXT).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("left", [["tokenizer.json"], ["vocab.json", "merges.txt"], []])
def test_gpt2s_is_gpt2s(tmp_path, left):
    files = huggingface.to_files(gpt2_tokenizer(), 16)
    folder = folder_of(tmp_path, 50_257, {name: files[name] for name in left})
    assert resolve_model(str(folder)).tokenizer().to_dict() == gpt2_tokenizer().to_dict()


def test_an_export_of_characters_is_read_back(tmp_path):
    own = CharTokenizer("\n abcdé")
    folder = folder_of(tmp_path, own.vocab_size, huggingface.to_files(own, 16))
    assert resolve_model(str(folder)).tokenizer().to_dict() == own.to_dict()


def changed(**parts):
    """tokenizer.json of GPT-2 with other parts; a part of None is left out."""
    content = json.loads(huggingface.to_files(gpt2_tokenizer(), 16)["tokenizer.json"])
    for path, value in parts.items():
        *sections, last = path.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value(place[last]) if callable(value) else value
    return {"tokenizer.json": json.dumps(content).encode()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (lambda: changed(normalizer={"type": "NFKC"}), "changes the text first"),
        (lambda: changed(pre_tokenizer__add_prefix_space=True), "a space before each text"),
        (lambda: changed(pre_tokenizer__use_regex=False), "'BPE' after 'ByteLevel'"),
        (lambda: changed(pre_tokenizer={"type": "Metaspace"}), "'BPE' after 'Metaspace'"),
        (lambda: changed(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "'Unigram', without"),
        (lambda: changed(model__merges=lambda merges: merges[::-1]), "not in the order of its ids"),
        (lambda: changed(model__vocab=lambda v: {**v, "qzqzqz": 50_257}), "its last token is not"),
        (lambda: {"tokenizer.model": b"x"}, "of a kind that is not read here"),
        (lambda: {"vocab.txt": b"[PAD]"}, "of a kind that is not read here"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, files, reason):
    folder = folder_of(tmp_path, 50_257, files())
    with pytest.raises(UserError, match=reason) as error:
        resolve_model(str(folder)).tokenizer()
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100_000, b'{"model": 3}', b'{"model": {"vocab": {"a": 1e300}, "merges": []}}',
     b'{"model": {"vocab": {"a": 0}, "merges": [[[]]]}, "pre_tokenizer": {"type": []}}'],
)  # fmt: skip
def test_a_damaged_one_is_one_line(tmp_path, content):
    folder = folder_of(tmp_path, 50_257, {"tokenizer.json": content})
    with pytest.raises(UserError) as error:
        resolve_model(str(folder)).tokenizer()
    assert str(error.value).startswith(f"{folder}/tokenizer.json: ")
    assert len(str(error.value)) < 500


@pytest.mark.slow
def test_a_vocabulary_without_its_merges_is_refused(tmp_path):
    files = huggingface.to_files(gpt2_tokenizer(), 16)
    folder = folder_of(tmp_path, 50_257, {"vocab.json": files["vocab.json"]})
    with pytest.raises(DamagedFile, match=r"merges\.txt: not readable"):
        resolve_model(str(folder)).tokenizer()


def test_tokenizer_and_model_of_two_sizes_do_not_belong_together(tmp_path):
    own = CharTokenizer("abc")
    folder = folder_of(tmp_path, 5, huggingface.to_files(own, 16))
    with pytest.raises(UserError, match="has 3 tokens, its model 5"):
        resolve_model(str(folder)).tokenizer()
