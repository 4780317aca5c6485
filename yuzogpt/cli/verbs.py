"""The verbs of the command line: what each takes, and the function that runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from yuzogpt.checkpoints.pretrained import PUBLISHED
from yuzogpt.cli import commands
from yuzogpt.cli.completion import script
from yuzogpt.config import (
    BenchSettings,
    CompletionSettings,
    DoctorSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    ListSettings,
    PrepareSettings,
    ReportSettings,
    SampleSettings,
    Section,
    ServeSettings,
    TrainSettings,
    TuneSettings,
)
from yuzogpt.config.resolve import preset_names
from yuzogpt.console.terminal import say
from yuzogpt.data.preparation.own_text import is_source


@dataclass(frozen=True)
class Verb:
    """One thing that the command does."""

    usage: str
    summary: str
    schema: type[Section]
    run: Callable[..., None]
    positional: tuple[str, ...] = ()  # settings that can be given without their names, in order
    takes: str = ""  # what the positional settings are, for messages
    or_else: tuple[str, Callable[[str], bool]] | None = None  # takes words for which this holds
    presets: Literal["", "train", "eval"] = ""  # which presets it takes
    is_resumable: bool = False  # the same command continues after an interruption
    is_search: bool = False  # takes `search:` and --search.KEY=...
    has_json: bool = False  # takes --json, short for --output=json
    examples: tuple[str, ...] = ()  # the end of its help

    @property
    def preset_names(self) -> list[str]:
        """The presets that it takes."""
        is_eval = self.presets == "eval"
        names = preset_names() if self.presets else []
        return [name for name in names if name.startswith("eval_") == is_eval]


def completion(settings: Section) -> None:
    """Print a script that completes the words of this command in a shell."""
    assert isinstance(settings, CompletionSettings)
    say(script(settings.completion.shell, VERBS), end="")


VERBS = {
    "prepare": Verb(
        "CORPUS | FILE", "turn text into a corpus of Arrow blocks",
        PrepareSettings, commands.prepare,
        ("dataset",), "one corpus", ("source", is_source), is_resumable=True,
        examples=("book.txt", "shakespeare_char", "s3://bucket/texts --dataset=texts"),
    ),
    "inspect": Verb(
        "DIR", "show what is in a prepared corpus", InspectSettings, commands.inspect,
        ("data_dir",), "one corpus", examples=("data/book", "data/book --verify"),
    ),
    "train": Verb(
        "[PRESET | FILE.yaml]...", "train a model on a prepared corpus",
        TrainSettings, commands.train, presets="train", is_resumable=True,
        examples=(
            "shakespeare_char_fast --dataset=book",
            "gpt2_124m mine.yaml --max_iters=1000 --dry_run",
            "finetune_custom --dataset=book --init_from=out-other",
        ),
    ),
    "tune": Verb(
        "[PRESET | FILE.yaml]...", "search for the best training settings",
        TuneSettings, commands.tune, presets="train", is_resumable=True, is_search=True,
        examples=("finetune_shakespeare --init_from=gpt2 --num_samples=8",),
    ),
    "report": Verb(
        "RUN [RUN]", "summarize a run or compare two, and write a page",
        ReportSettings, commands.report,
        ("out_dir", "against"), "two runs", examples=("out-book", "out-book out-other"),
    ),
    "evaluate": Verb(
        "RUN | DIR | gpt2 | PRESET", "score a model on benchmarks",
        EvaluateSettings, commands.evaluate,
        ("model",), "one model", presets="eval", is_resumable=True,
        examples=("out-book --tasks=loss --dataset=book", "gpt2 --tasks=lambada --limit=100"),
    ),
    "bench": Verb(
        "[PRESET | FILE.yaml]...", "measure how long a training step takes",
        BenchSettings, commands.bench, presets="train", has_json=True,
        examples=("gpt2_124m --launchers=bare,torchrun",),
    ),
    "sample": Verb(
        "RUN | DIR | gpt2", "generate text with a model", SampleSettings, commands.sample,
        ("out_dir",), "one model", ("init_from", PUBLISHED.__contains__),
        examples=("out-book --start='Once upon' --num_samples=2", "gpt2 --interactive"),
    ),
    "serve": Verb(
        "RUN | DIR | gpt2", "serve a model over HTTP, with a web page",
        ServeSettings, commands.serve, ("model",), "one model",
        examples=("out-book", "out-book --num_replicas=0 --port=8080"),
    ),
    "doctor": Verb(
        "", "check that a cluster is healthy", DoctorSettings, commands.doctor, has_json=True,
        examples=("--num_nodes=4 --storage=/shared",),
    ),
    "export": Verb(
        "RUN --to=huggingface DIR", "write a checkpoint as a Hugging Face folder",
        ExportSettings, commands.export, ("out_dir", "hf_dir"), "one run, and one folder,",
        examples=("out-book --to=huggingface hf-book",),
    ),
    "list": Verb(
        "[DIR]", "list presets, corpora, runs and models", ListSettings, commands.list_all,
        ("directory",), "one directory",
    ),
    "completion": Verb(
        "bash | zsh | fish", "print the completion of a shell",
        CompletionSettings, completion, ("shell",), "one shell",
        examples=("bash > ~/.local/share/bash-completion/completions/yuzogpt",),
    ),
}  # fmt: skip
