"""`yuzogpt report` and `yuzogpt export`: what reads a run."""

from typing import Literal

from yuzogpt.config.section import Section, setting


class ReportedRun(Section):
    """A run, and where its page goes."""

    out_dir: str = setting("", "the run's directory; it may be going on", path="store")
    html: str = setting("", "the page; empty: report.html in out_dir", path="local", if_empty="")
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")


class ReportSettings(Section):
    """`yuzogpt report`."""

    report: ReportedRun = ReportedRun()


class ExportTarget(Section):
    """From a checkpoint to a folder that other programs load."""

    out_dir: str = setting(
        "out", "the run (its best checkpoint) or checkpoint to export", path="store"
    )
    to: Literal["huggingface"] = setting(
        "huggingface", "the format: what transformers, vLLM and lm-evaluation-harness load"
    )
    hf_dir: str = setting("hf", "the folder to write; must not exist", path="local")
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")


class ExportSettings(Section):
    """`yuzogpt export`."""

    export: ExportTarget = ExportTarget()
