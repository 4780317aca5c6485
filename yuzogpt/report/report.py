"""`yuzogpt report`: a run's metrics.jsonl -> the terminal, and one HTML file.

In: a run's directory, of a run that ended, was killed or goes on. Out: text and report.html. Reads
the run and changes nothing of it; needs neither torch nor ray.
"""

from pathlib import Path

from yuzogpt import runs
from yuzogpt.errors import UserError
from yuzogpt.report import tables, terminal
from yuzogpt.report.history import History
from yuzogpt.report.page import is_page, page
from yuzogpt.report.plots import plots
from yuzogpt.report.summary import summarize
from yuzogpt.runs.event_log import read_records
from yuzogpt.storage.atomic_files import write_durably
from yuzogpt.storage.run_storage import LocalStorage, RunStorage
from yuzogpt.storage.untrusted import open_regular

HEAD_BYTES = 4096  # of a page, which say whose it is


def write(run: RunStorage, html: Path | None) -> str:
    """Report on a run; return where the page is. UserError if there is no run."""
    name = run.display_name
    file: RunStorage = LocalStorage(html) if html else run / runs.REPORT
    if html and (html.suffix not in (".html", ".htm") or html.is_dir()):
        raise UserError(f"--html={html}: not the name of a page; let it end in .html")
    if html and not html.parent.is_dir():
        raise UserError(f"--html={html}: {html.parent} is not a directory")
    refuse_foreign(file)
    metrics = run.local / runs.METRICS
    if not metrics.is_file():
        raise UserError(f"{name}: no run here (no {runs.METRICS}); give the out_dir of a run")
    history = History.read(metrics)
    if history is None:
        raise UserError(f"{name}: no run here (no {runs.METRICS} with a whole record in it)")
    summary = summarize(run.local, history)
    known = tables.facts(summary)
    found = [
        *tables.benchmarks(read_records(run.local / runs.EVALUATIONS)),
        *tables.tables(summary),
    ]
    terminal.show(tables.plain(summary.name), known, found)
    write_durably(file.local, page(summary, known, found, plots(history, summary)).encode())
    file.upload()
    return file.display_name


def refuse_foreign(file: RunStorage) -> None:
    """Raise UserError if there is a file of the user's where the page is to be."""
    name = file.display_name
    try:
        with open_regular(file.local, name) as page_file:
            is_ours = is_page(page_file.read(HEAD_BYTES))
    except FileNotFoundError:
        return
    if not is_ours:
        raise UserError(f"{name}: not a page of `yuzogpt report`; choose another with --html=FILE")
