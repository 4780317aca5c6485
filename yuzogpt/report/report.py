"""`yuzogpt report`: a run's metrics.jsonl -> the terminal, and one HTML file.

The run may be finished, killed or still running. The report changes none of its files, and needs no
ray; torch only draws the samples.
"""

from pathlib import Path

from yuzogpt import runs
from yuzogpt.errors import UserError
from yuzogpt.report import samples, settings, tables, terminal
from yuzogpt.report.history import History
from yuzogpt.report.page import is_page, page
from yuzogpt.report.plots import plots
from yuzogpt.report.summary import Summary, summarize
from yuzogpt.runs.event_log import read_records
from yuzogpt.storage.atomic_files import write_durably
from yuzogpt.storage.run_storage import LocalStorage, RunStorage
from yuzogpt.storage.untrusted import open_regular

HEAD_BYTES = 4096  # of a page, by which it is recognised


def write(run: RunStorage, html: Path | None, num_samples: int = 0) -> str:
    """Report on a run; return where the page is. UserError if there is no run."""
    file: RunStorage = LocalStorage(html) if html else run / runs.REPORT
    check_page(file, html)
    history, summary = read(run)
    facts = tables.facts(summary)
    evaluations = read_records(run.local / runs.EVALUATIONS)
    shown = [*tables.benchmarks(evaluations), *tables.tables(summary)]
    terminal.show(tables.plain(summary.name), facts, shown)
    texts = samples.draw(run, num_samples)
    shown = [*settings.table(summary.settings), *shown]
    write_durably(file.local, page(summary, facts, shown, plots(history, summary), texts).encode())
    file.upload()
    return file.display_name


def read(run: RunStorage) -> tuple[History, Summary]:
    """Return what a run recorded; UserError if there is no run."""
    name, metrics = run.display_name, run.local / runs.METRICS
    if not metrics.is_file():
        raise UserError(f"{name}: no run here (no {runs.METRICS}); give the out_dir of a run")
    history = History.read(metrics)
    if history is None:
        raise UserError(f"{name}: no run here (no {runs.METRICS} with a whole record in it)")
    return history, summarize(run.local, history)


def check_page(file: RunStorage, html: Path | None) -> None:
    """Raise UserError if a page cannot be written, or would replace a file that is not a report.

    `html`: where the user wants it; None: at its usual place.
    """
    if html and (html.suffix not in (".html", ".htm") or html.is_dir()):
        raise UserError(f"--html={html}: not the name of a page; let it end in .html")
    if html and not html.parent.is_dir():
        raise UserError(f"--html={html}: {html.parent} is not a directory")
    name = file.display_name
    try:
        with open_regular(file.local, name) as page_file:
            is_ours = is_page(page_file.read(HEAD_BYTES))
    except FileNotFoundError:
        return
    if not is_ours:
        raise UserError(f"{name}: not a page of `yuzogpt report`; choose another with --html=FILE")
