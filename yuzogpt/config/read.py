"""`yuzogpt report`, `export`, `list` and `completion`."""

from typing import Literal

from yuzogpt.config.section import STORAGE, Count, Section, setting


class ReportedRun(Section):
    """Which run, and where its page is written."""

    out_dir: str = setting(
        "", "directory of the run, finished or still running", path="store", is_required=True
    )
    against: str = setting(
        "", "another run: compare curves, figures and the settings that differ", path="store"
    )
    html: str = setting(
        "",
        "file for the page; empty: report.html in out_dir, or report-A-B.html here to compare",
        path="local",
    )
    num_samples: Count = setting(
        2, "samples from the best checkpoint, drawn on one core for the page; 0: none"
    )
    storage: str = setting("", STORAGE)


class ReportSettings(Section):
    """`yuzogpt report`."""

    report: ReportedRun = ReportedRun()


class ExportTarget(Section):
    """Which checkpoint is exported, and to which folder."""

    out_dir: str = setting("out", "run (its best checkpoint) or checkpoint to export", path="store")
    to: Literal["huggingface"] = setting(
        "huggingface", "format; huggingface loads in transformers, vLLM and lm-evaluation-harness"
    )
    hf_dir: str = setting("hf", "folder to write; it must not exist yet", path="local")
    storage: str = setting("", STORAGE)


class ExportSettings(Section):
    """`yuzogpt export`."""

    export: ExportTarget = ExportTarget()


class ListedDirectory(Section):
    """Where corpora, runs and models are looked for."""

    directory: str = setting(".", "directory; corpora are found in its data/, too", path="local")
    storage: str = setting("", STORAGE)


class ListSettings(Section):
    """`yuzogpt list`."""

    list: ListedDirectory = ListedDirectory()


class CompletedShell(Section):
    """Which shell's completion is printed."""

    shell: Literal["bash", "zsh", "fish"] = setting("bash", "the shell")


class CompletionSettings(Section):
    """`yuzogpt completion`."""

    completion: CompletedShell = CompletedShell()
