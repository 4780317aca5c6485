"""`yuzogpt prepare` and `yuzogpt inspect`: corpora."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from yuzogpt.config.registry import OneOf
from yuzogpt.config.section import RAY_ADDRESS, STORAGE, Auto, Count, Name, Section, setting

CORPUS = OneOf("yuzogpt.data.preparation.corpora:CORPORA", is_open=True)
SPLIT_RULE = OneOf(
    "yuzogpt.data.preparation.splits:SPLIT_RULES",
    (("", ""), ("tail", "the last tenth of the text")),
)


class CorpusSettings(Section):
    """Which text becomes which corpus."""

    dataset: Annotated[Name, CORPUS] = setting(
        "shakespeare_char", "name of the corpus; empty with --source: the name of that file"
    )
    source: str = setting(
        "",
        "text to prepare: a local file, folder or glob, or one at s3://, gs://, hf:// (parquet, "
        "JSON lines, plain text; .gz, .zst); empty: download the corpus's own source",
        path="remote",
    )
    tokenizer: Literal["", "char", "gpt2"] = setting(
        "", "empty: the corpus's own; of your own: char for a text file of up to 20 MB, else gpt2"
    )
    data_dir: str = setting(
        "", "output directory; empty: data/<dataset>", path="local", if_empty="data/{dataset}"
    )
    storage: str = setting("", STORAGE)
    overwrite: bool = setting(False, "replace what is in data_dir")


class DistributedPrepareSettings(Section):
    """Preparing a corpus that need not fit in memory: openwebtext, folders, parquet, ..."""

    text_column: str = setting(
        "text", "column or field that holds the text, in parquet and JSON lines"
    )
    by_line: bool = setting(False, "each line of plain text is a document; False: each file is one")
    split_rule: Annotated[str, SPLIT_RULE] = setting(
        "",
        "how the val split is chosen; empty: the corpus's own rule, else tail for one text file "
        "and hash for several",
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.0005, "share of documents held out, but for tail; at least one document"
    )
    max_document_bytes: Count = setting(0, "reject longer documents; 0: no limit", "bytes")
    block_tokens: Annotated[int, Field(gt=0, lt=2**31)] = setting(
        2**25, "most tokens in a block; documents are never split between blocks", "tokens"
    )
    num_workers: Auto | Count = setting(
        "auto", "concurrent Ray Data tasks; auto: one per core; 0: run in this process, without Ray"
    )
    ray_address: str = setting("", RAY_ADDRESS)

    @model_validator(mode="after")
    def check(self) -> Self:
        """Without Ray there is no cluster to join."""
        if self.num_workers == 0 and self.ray_address:
            raise ValueError("--num_workers=0 runs without Ray; leave out it or --ray_address")
        return self


class PrepareSettings(Section):
    """`yuzogpt prepare`."""

    corpus: CorpusSettings = CorpusSettings()
    preparation: DistributedPrepareSettings = DistributedPrepareSettings()


class InspectedCorpus(Section):
    """Which prepared corpus, and what to do with it."""

    data_dir: str = setting("", "directory of the prepared corpus", path="remote", is_required=True)
    storage: str = setting("", STORAGE)
    examples: Count = setting(
        3, "documents whose beginning is printed; with --verify or --export_bin only if set"
    )
    verify: bool = setting(False, "check the SHA-256 of every block")
    export_bin: bool = setting(False, "write nanoGPT's train.bin and val.bin next to the blocks")


class InspectSettings(Section):
    """`yuzogpt inspect`."""

    inspect: InspectedCorpus = InspectedCorpus()
