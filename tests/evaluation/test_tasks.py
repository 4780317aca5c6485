"""Metrics that can be computed by hand, and what they must not depend on."""

import json
import math

import pytest
import torch

from tests.inference.engines import ALPHABET, small_model
from yuzogpt.config import DeviceSettings
from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks import formats, tasks
from yuzogpt.evaluation.benchmarks.corpus_loss import prepare_loss
from yuzogpt.evaluation.benchmarks.readers import (
    PreparedTask,
    TaskOptions,
    answer_tokens,
    stop_tokens,
)
from yuzogpt.evaluation.passages import Passage, Score, continuation, windows
from yuzogpt.evaluation.scoring import score
from yuzogpt.model.gpt import GPT
from yuzogpt.runtime.device import choose_hardware
from yuzogpt.runtime.world import World
from yuzogpt.tokenization.tokenizer import CharTokenizer, gpt2_tokenizer, start_of

HARDWARE = choose_hardware(DeviceSettings(device="cpu", dtype="float32", threads=1), World())


class Two:
    """A tokenizer of two characters, without an end of text."""

    end_of_text = None
    encode = staticmethod(CharTokenizer("\na").encode)


def prepare(
    task, path, tokenizer, *, stride=32, stop_words=False, protocol="paper"
) -> PreparedTask:
    """Read a task's file for a context of 32 tokens."""
    options = TaskOptions(tokenizer, 32, stride, stop_words)
    return tasks.prepare(task, protocol, path, options)


def uniform_model(vocab_size: int = 2) -> GPT:
    """Return a model for which all tokens are always equally probable."""
    model = small_model(1, vocab_size=vocab_size, n_embd=8, n_head=2, vocab_multiple=1)
    with torch.no_grad():
        model.wte.weight.zero_()
    return model


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 100])
@pytest.mark.parametrize("stride", [1, 5, 32])
def test_windows_score_every_token_once_with_all_the_context_there_is(length, stride):
    tokens = list(range(1, length + 1))
    found = list(windows(tokens, 0, 32, stride))
    assert [t for passage in found for t in passage.tokens[-passage.scored :]] == tokens
    for passage in found:
        last = passage.tokens[-1]
        read = passage.tokens[:-1]
        assert len(read) == min(32, last)  # all that fits, or all that there is
        assert list(passage.tokens) == list(range(last - len(read), last + 1))
    assert all(passage.scored <= stride for passage in found[1:])


def test_a_text_under_a_uniform_model_is_exact(tmp_path):
    """Two equally probable tokens: perplexity 2 per token, 1 bit per byte, with any windows."""
    path = tmp_path / "enwik8.zip"
    path.with_suffix(".txt").write_bytes(b"a\na\na" * 20)
    prepared = prepare("enwik8", path.with_suffix(".txt"), Two(), stride=7)
    scores = score(uniform_model(), prepared.passages, 3, HARDWARE)
    bits, per_token = prepared.compute_metrics(scores)
    assert (bits.name, bits.counted, bits.unit) == ("bits_per_byte", 100, "bytes")
    assert bits.value == pytest.approx(1, abs=1e-7)
    assert (per_token.name, per_token.counted) == ("token_perplexity", 100)
    assert per_token.value == pytest.approx(2, abs=1e-6)


def test_words_are_counted_as_in_the_original(tmp_path):
    """Two words and an end of line are three tokens of the original, and here four of the model."""
    path = tmp_path / "ptb.test.txt"
    path.write_text(" a a \n")
    prepared = prepare("ptb", path, CharTokenizer("\n a"))
    scores = score(uniform_model(3), prepared.passages, 1, HARDWARE)
    figures = {one.name: one for one in prepared.compute_metrics(scores)}
    assert figures["perplexity"].counted == 3
    assert figures["token_perplexity"].counted == len("a a\n")
    assert figures["perplexity"].value == pytest.approx(3 ** (4 / 3), rel=1e-6)


@pytest.mark.parametrize("task", ["ptb", "1bw"])
def test_an_end_of_line_is_scored_where_it_is_counted(task, tmp_path):
    """Ten equally probable tokens: the perplexity of a word and of an end of line is 10 each."""
    path = tmp_path / "text.txt"
    path.write_text(" a \n b \n")
    prepared = prepare(task, path, CharTokenizer("\n abcdefgh"))
    figure, *_ = prepared.compute_metrics(score(uniform_model(10), prepared.passages, 1, HARDWARE))
    assert (figure.name, figure.counted) == ("perplexity", 4)
    assert figure.value == pytest.approx(10.0, rel=1e-6)


def test_a_line_without_a_sentence_is_none(tmp_path):
    path = tmp_path / "1bw_test.txt"
    path.write_text("a b\n\n \na\n\n")
    prepared = prepare("1bw", path, CharTokenizer("\n ab"))
    assert prepared.notes["sentences"] == len(prepared.passages) == 2
    figure, *_ = prepared.compute_metrics(score(uniform_model(4), prepared.passages, 1, HARDWARE))
    assert figure.counted == 3 + 2


def test_a_score_is_the_models_own(tmp_path):
    model, tokens = small_model(1), tuple(torch.randint(0, 65, (20,)).tolist())
    (found,) = score(model, [Passage(tokens, 6)], 1, HARDWARE)
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
    expected = sum(logprobs[place, tokens[place + 1]].item() for place in range(13, 19))
    assert found.logprob == pytest.approx(expected, abs=1e-5)


def test_scores_do_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(1)
    passages = [
        Passage(tuple(torch.randint(0, 65, (2 + n % 31,), generator=generator).tolist()), 1 + n % 2)
        for n in range(50)
    ]
    passages = [one if one.scored < len(one.tokens) else Passage(one.tokens, 1) for one in passages]
    model = small_model(1)
    alone = [score(model, [passage], 1, HARDWARE)[0] for passage in passages]
    for batch_size in (3, 8, 50):
        together = score(model, passages, batch_size, HARDWARE)
        for one, other in zip(alone, together, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.is_greedy == other.is_greedy


def test_continuations():
    tokenizer = CharTokenizer(ALPHABET)
    passage = continuation("bead", " game", tokenizer, 32)
    assert (len(passage.tokens), passage.scored) == (9, 5)
    moved = continuation("bead ", "game", tokenizer, 32)  # its space is the text's
    assert moved == passage
    long = continuation("b" * 40, "game", tokenizer, 32)
    assert (len(long.tokens), long.scored) == (33, 4)
    empty = continuation("", "game", tokenizer, 32)
    assert tokenizer.decode(empty.tokens) == "\ngame"
    assert empty.scored == 4


def test_the_last_word_with_and_without_stop_words(tmp_path):
    """A banned token is not the greedy answer; log-likelihoods do not change."""
    path = tmp_path / "lambada_test.jsonl"
    path.write_text(json.dumps({"text": "bead game"}) + "\n" + json.dumps({"text": "a b c"}) + "\n")
    tokenizer = CharTokenizer(ALPHABET)
    prepared = prepare("lambada", path, tokenizer)
    answers = [tokenizer.decode(answer_tokens(passage)) for passage in prepared.passages]
    assert answers == [" game", " c"]
    assert prepared.notes["stop_word_filter"] == "off"
    model = small_model(1)
    together = score(model, prepared.passages, 2, HARDWARE)
    perplexity, accuracy, last = prepared.compute_metrics(together)
    scores = score(model, prepared.passages, 1, HARDWARE)
    assert perplexity.value == pytest.approx(math.exp(-sum(s.logprob for s in scores) / 2))
    assert perplexity.unit == "last words"
    assert accuracy.counted == last.counted == 2
    banned = tuple(range(65))[:-1]
    (only,) = score(model, [Passage((1, 2, 64), 1, banned)], 1, HARDWARE)
    assert only.is_greedy  # nothing else could be said
    (banned_only,) = score(model, [Passage((1, 2, 64), 1, (64,))], 1, HARDWARE)
    assert not banned_only.is_greedy
    assert banned_only.logprob == only.logprob  # the filter is for answers, not for likelihoods


def test_a_stop_word_that_only_begins_the_answer_is_none(tmp_path):
    path = tmp_path / "lambada_test.jsonl"
    texts = ("he went inside", "she came in", "he ate the cake")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = gpt2_tokenizer()
    prepared = prepare("lambada", path, tokenizer, stop_words=True)
    inside, only_in, cake = prepared.passages
    (word,) = tokenizer.encode(" in").tolist()
    assert [tokenizer.decode([t]) for t in answer_tokens(inside)] == [" inside"]
    assert all(word in passage.banned_tokens for passage in (inside, only_in, cake))
    assert prepared.notes["stop_word_filter"] == "on"
    assert prepared.notes["answers_that_are_stop_words"] == 1
    # " hers" is " her" and "s": no stop word of one token, though it begins with one.
    path.write_text(json.dumps({"text": "the herscape"}) + "\n")
    (odd,) = prepare("lambada", path, tokenizer, stop_words=True).passages
    first, *rest = answer_tokens(odd)
    assert rest and tokenizer.decode([first]) == " her"
    assert first not in odd.banned_tokens and word in odd.banned_tokens


def test_a_text_without_line_ends_begins_with_a_space():
    assert start_of(CharTokenizer(" a")) == 0
    assert start_of(CharTokenizer("\n a")) == 0
    assert start_of(gpt2_tokenizer()) == 50256


def test_childrens_books_as_people_write(tmp_path):
    """The file's tokens are the Penn Treebank's; the gap may follow an opening quote."""
    path = tmp_path / "cbtest_CN_valid_2000ex.txt"
    story = "".join(f"{n} `` I do n't know , '' said the {n}th king -LRB- sadly -RRB- .\n"
                    for n in range(1, 21))  # fmt: skip
    path.write_text(
        f"{story}21 `` XXXXX , '' said she , `` the king 's here !\tdear\t\tdear|cat\n\n"
        f"{story}21 he saw a XXXXX ; ` oh ' he said .\tcat\t\tdear|cat\n"
    )
    quoted, plain = formats.childrens_books(path)
    first = '"I don\'t know," said the 1th king (sadly).'
    assert quoted.context.startswith(f"{first} \"I don't know")
    assert quoted.context.endswith('20th king (sadly). "')
    assert quoted.choices == [
        "dear,\" said she, \"the king's here!", "cat,\" said she, \"the king's here!"
    ]  # fmt: skip
    assert (quoted.answer, plain.answer) == (0, 1)
    assert plain.context.endswith("(sadly). he saw a ")
    assert plain.choices[1] == "cat; 'oh' he said."


@pytest.mark.parametrize(
    "damage",
    [{"label": 4}, {"label": -1}, {"label": "x"}, {"endings": ["a", "b", "[step]", "d"]},
     {"endings": 7}, {"ctx_b": None}],
)  # fmt: skip
def test_a_scene_that_is_not_hellaswags_is_named(tmp_path, damage):
    path = tmp_path / "hellaswag_val.jsonl"
    scene = {"activity_label": "Eating", "ctx_a": "He eats.", "ctx_b": "then", "label": 1,
             "endings": ["a", "b", "c", "d"]}  # fmt: skip
    path.write_text(json.dumps(scene) + "\n")
    (question,) = formats.hellaswag(path)
    assert (question.context, question.answer) == ("Eating: He eats. Then ", 1)
    path.write_text(json.dumps(scene) + "\n" + json.dumps(scene | damage) + "\n")
    with pytest.raises(UserError, match=r"hellaswag_val.jsonl:2: not a line of HellaSwag"):
        formats.hellaswag(path)


def test_a_scenes_ends_are_the_harness_own(tmp_path):
    """Its length is that of the end as it is read, spaces and all; the label is its number."""
    path = tmp_path / "hellaswag_val.jsonl"
    scene = {"activity_label": "a", "ctx_a": "b.", "ctx_b": "c", "label": 1,
             "endings": ["dd", "dd", "e [step]", "fff"]}  # fmt: skip
    path.write_text(json.dumps(scene) + "\n")
    prepared = prepare("hellaswag", path, gpt2_tokenizer(), protocol="harness")
    for logprobs, expected in (
        ((-9.0, -1.0, -9.0, -9.0), (1, 1)),
        ((-1.0, -1.0, -9.0, -9.0), (0, 0)),  # the first of equals is the answer
        ((-9.0, -1.7, -1.8, -9.0), (1, 1)),  # by length: of two characters each, ...
        ((-9.0, -1.7, -1.6, -9.0), (0, 0)),
        ((-9.0, -1.7, -9.0, -2.0), (1, 0)),  # ... and of three
    ):
        scores = [Score(value, False, False) for value in logprobs]
        values = tuple(metric.value for metric in prepared.compute_metrics(scores))
        assert values == expected, logprobs


def test_stop_words_are_those_that_a_vocabulary_has_letters_for():
    tokenizer = CharTokenizer("\n ,ab")
    assert stop_tokens(tokenizer) == {*tokenizer.encode("\n,").tolist()}


def test_the_split_that_is_too_short_is_named(gpt2_corpus_dir):
    with pytest.raises(UserError, match="the train split has"):
        prepare_loss(str(gpt2_corpus_dir), TaskOptions(gpt2_tokenizer(), 10**7, 1, False), 1)


def test_a_line_that_is_not_tokenized_is_named(tmp_path):
    path = tmp_path / "wikitext2_test.txt"
    path.write_text(" a b \nHe said it.\n")
    with pytest.raises(UserError, match=r"wikitext2: .*wikitext2_test.txt:2: not a line of tokens"):
        prepare("wikitext2", path, gpt2_tokenizer())


def test_float32_means_float32():
    """On GPUs training may round inputs of matrix products to 10 bits; evaluation must not."""
    torch.backends.cuda.matmul.allow_tf32 = True
    score(small_model(1), [Passage((1, 2, 3), 1)], 1, HARDWARE)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_questions(tmp_path):
    path = tmp_path / "cbt.txt"
    story = "".join(f"{n} bead game {n} .\n" for n in range(1, 21))
    path.write_text(story + "21 a bead XXXXX game .\tdeal\t\tdeal|meal|hell\n\n")
    tokenizer = CharTokenizer(ALPHABET + ".")
    prepared = prepare("cbt_cn", path, tokenizer)
    ends = [tokenizer.decode(answer_tokens(passage)) for passage in prepared.passages]
    assert ends == [" deal game.", " meal game.", " hell game."]
    by_hand = [type("S", (), {"logprob": value})() for value in (-3.0, -1.0, -2.0)]
    accuracy, _ = prepared.compute_metrics(by_hand)
    assert (accuracy.value, accuracy.counted) == (0.0, 1)
