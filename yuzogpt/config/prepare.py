"""`yuzogpt prepare`, and `yuzogpt inspect`: corpora."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from yuzogpt.config.section import Auto, Count, Name, Section, setting


class CorpusSettings(Section):
    """Which text becomes which corpus."""

    dataset: Name = setting(
        "shakespeare_char", "name of the corpus; a new name needs --source and --tokenizer"
    )
    source: str = setting(
        "",
        "text: a file, folder or glob, here or at s3://, gs://, hf:// (parquet, JSON lines, plain "
        "text; .gz, .zst); empty: the corpus's own, downloaded",
        path="remote",
        if_empty="",
    )
    tokenizer: Literal["", "char", "gpt2"] = setting("", "empty: the corpus's own")
    data_dir: str = setting(
        "", "where it goes; empty: data/<dataset>", path="local", if_empty="data/{dataset}"
    )
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")
    overwrite: bool = setting(False, "replace what data_dir holds")


class DistributedPrepareSettings(Section):
    """How a corpus is prepared that need not fit in memory: openwebtext, folders, parquet, ..."""

    text_column: str = setting("text", "of parquet and JSON lines")
    by_line: bool = setting(False, "each line of plain text is a document; False: each file")
    split_rule: Literal["", "tail", "nanogpt", "hash"] = setting(
        "",
        "tail: the last tenth; nanogpt: its shuffle with seed 2357; hash: by each document's "
        "SHA-256; empty: the corpus's own, else tail for one text file, hash for more",
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.0005, "share of documents that nanogpt and hash hold out; one at least"
    )
    max_document_bytes: Count = setting(0, "longer documents are rejected; 0: none", "bytes")
    block_tokens: Annotated[int, Field(gt=0, lt=2**31)] = setting(
        2**25, "a block has at most as many; documents are not cut", "tokens"
    )
    num_workers: Auto | Count = setting(
        "auto", "tasks at a time on Ray Data; auto: one per core; 0: this process, without Ray"
    )
    ray_address: str = setting("", "join this Ray cluster; empty: RAY_ADDRESS, else embedded Ray")

    @model_validator(mode="after")
    def check(self) -> Self:
        """Refuse what excludes each other."""
        if self.num_workers == 0 and self.ray_address:
            raise ValueError("--num_workers=0 is this process, without --ray_address; give one")
        return self


class PrepareSettings(Section):
    """`yuzogpt prepare`."""

    corpus: CorpusSettings = CorpusSettings()
    preparation: DistributedPrepareSettings = DistributedPrepareSettings()


class InspectedCorpus(Section):
    """A prepared corpus, and what to do with it."""

    data_dir: str = setting("", "the corpus's directory", path="remote")
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")
    examples: Count = setting(
        3, "documents to print the beginning of; with --verify or --export_bin only if given"
    )
    verify: bool = setting(False, "hash every block anew")
    export_bin: bool = setting(False, "write nanoGPT's train.bin and val.bin beside the blocks")


class InspectSettings(Section):
    """`yuzogpt inspect`."""

    inspect: InspectedCorpus = InspectedCorpus()
