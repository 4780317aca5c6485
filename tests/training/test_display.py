"""What a person sees, and what W&B is sent."""

import http.server
import io
import json
import os
import threading

import pytest

from tests.conftest import TINY, tiny_settings, yuzogpt
from tests.training.worlds import train_here
from tests.waiting import wait_until
from yuzogpt.config import LogSettings
from yuzogpt.console.quantities import time_left
from yuzogpt.runs.event_log import Follower, MetricsLog, append_record, read_records
from yuzogpt.storage.run_storage import LocalStorage
from yuzogpt.training.progress import Display, take_wandb_key


def train_record(step):
    return {
        "kind": "train", "step": step, "loss": 2.5, "tokens_per_second": 1000.0,
        "tokens_per_step": 500,
    }  # fmt: skip


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with Display(tiny_settings(tmp_path, tmp_path, "--max_iters=100")) as show:
        show({"kind": "notice", "step": 0, "text": "hello"})
        show({"kind": "evaluation", "step": 0, "val_loss_estimate": 3.0})
        for step in range(1, 101):
            show(train_record(step))
    assert capsys.readouterr().out.splitlines() == [
        "hello",
        "step 0: val_loss_estimate 3.0000",
        "step 1/100: loss 2.5000, val_loss_estimate 3.0000, 1,000 tokens/s, ETA 00:00:49",
        "step 100/100: loss 2.5000, val_loss_estimate 3.0000, 1,000 tokens/s, ETA 00:00:00",
    ]


def test_a_logger_that_fails_is_left_out_with_one_line(tmp_path, capsys):
    class Broken:
        def __call__(self, record):
            raise ValueError("no such project")

    seen = []
    with Display(tiny_settings(tmp_path, tmp_path)) as show:
        show.loggers = [Broken(), seen.append]
        for step in (1, 2):
            show(train_record(step))
        show.loggers.clear()
    assert [record["step"] for record in seen] == [1, 2]
    assert capsys.readouterr().err == "!!! logger Broken is left out: no such project\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "00:00:00"), (59.9, "00:00:59"), (86399, "23:59:59"), (200_000, "2.3 days")],
)
def test_time_left_does_not_wrap_at_a_day(seconds, text):
    assert time_left(seconds) == text


def test_a_stdout_that_lacks_characters_is_no_reason_to_end(tmp_path):
    """What it has not is a question mark; here in the name of a run."""
    result = yuzogpt("train", f"--out_dir={tmp_path}/läuft—", "--dry_run", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "l?uft?" in result.stdout


def test_one_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Display(tiny_settings(tmp_path, tmp_path, "--max_iters=3")) as show:
        show({"kind": "start", "step": 0})
        assert "| 0/3" in terminal.getvalue()  # there before the first step is made
        for step in (1, 2, 3):
            show(train_record(step))
    assert "3/3" in terminal.getvalue()
    assert "loss 2.5000" in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 1  # redrawn in place


def test_a_resumed_run_undoes_later_records_and_followers_notice(tmp_path):
    path, seen = tmp_path / "metrics.jsonl", []
    with Follower(LocalStorage(path), seen.append):
        log = MetricsLog(LocalStorage(path), -1, None)
        for step in range(1, 6):
            log.write("train", step, loss=step)
        log.close()
        append_record(LocalStorage(path), "failure", "worker 0 failed")
        wait_until(lambda: len(seen) == 6)
        resumed = MetricsLog(LocalStorage(path), 3, None)
        resumed.write("train", 4, loss=40)
        resumed.close()
    assert [record.get("loss", record["kind"]) for record in seen] == [
        1, 2, 3, 4, 5, "failure", "undone", 40,
    ]  # fmt: skip
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record.get("loss", record["kind"]) for record in kept] == [
        1, 2, 3, "failure", "undone", 40,
    ]  # fmt: skip


def test_steps_undone_are_counted_until_the_loop_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(LocalStorage(path), -1, None)
    for step in range(1, 9):
        log.write("train", step, rows_seen=step * (step + 1))  # in a batch that grows
    log.close()
    # The next one is killed before its loop begins.
    MetricsLog(LocalStorage(path), 6, None, rows_seen=42).close()
    # The checkpoint of step 6 was corrupt.
    again = MetricsLog(LocalStorage(path), 5, None, rows_seen=30)
    assert (again.undone_steps, again.undone_rows) == (3, 72 - 30)
    again.write("start", 5)
    again.close()
    assert MetricsLog(LocalStorage(path), 5, None, rows_seen=30).undone_steps == 0


def test_ctrl_c_in_the_middle_of_a_write_leaves_no_line_twice(tmp_path):
    class Interrupted(io.FileIO):
        def write(self, content):
            written = super().write(content)
            if b'"step": 2' in content:
                raise KeyboardInterrupt
            return written

    log = MetricsLog(LocalStorage(tmp_path / "metrics.jsonl"), -1, None)
    log.file = Interrupted(tmp_path / "metrics.jsonl", "ab")
    log.write("train", 1)
    with pytest.raises(KeyboardInterrupt):
        log.write("train", 2)
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    MetricsLog(LocalStorage(path), 1, None).close()
    assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_the_wandb_key_leaves_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    assert take_wandb_key(LogSettings()) == "canary"
    assert "WANDB_API_KEY" not in os.environ
    assert take_wandb_key(LogSettings()) == "canary"  # of a second run in one process
    (tmp_path / "key").write_text("from a file\n")
    from_file = LogSettings(wandb_log=True, wandb_key_file=str(tmp_path / "key"))
    assert take_wandb_key(from_file) == "from a file"


class Refusing(http.server.BaseHTTPRequestHandler):
    """Takes no key."""

    def do_GET(self) -> None:
        """Refuse."""
        self.send_response(401)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "is_there", "message"),
    [
        ("", True, "no key; `wandb login` or"),
        ("canary" * 7, False, "is not within reach (Connection refused); or set WANDB_MODE=off"),
        ("canary" * 7, True, "W&B did not begin a run"),
    ],
)
def test_wandb_that_cannot_work_is_one_line_and_changes_nothing(
    corpus_dir, tmp_path, key, is_there, message
):
    pytest.importorskip("wandb")
    (tmp_path / "key").write_text(key)
    (tmp_path / "key").chmod(0o600)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    if not is_there:
        server.shutdown()
        server.server_close()
    run = tmp_path / "run"
    train_here(tiny_settings(corpus_dir, run, "--max_iters=2"))
    before = sorted(run.rglob("*"))
    flags = ["--num_workers=0", "--overwrite", "--wandb_log=True"]
    if key:
        flags.append(f"--wandb_key_file={tmp_path / 'key'}")
    places = [f"--data_dir={corpus_dir}", f"--out_dir={run}"]
    result = yuzogpt(
        "train", *TINY, *places, *flags, HOME=str(tmp_path), WANDB_BASE_URL=url, no_proxy="*"
    )
    if is_there:
        server.shutdown()
        server.server_close()
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("yuzogpt: ")]
    assert message in line
    left = {path for path in run.rglob("*") if "wandb" not in path.parts}
    assert sorted(left) == before


@pytest.mark.slow
def test_wandb_works_offline_and_the_key_stays_secret(corpus_dir, tmp_path):
    pytest.importorskip("wandb")
    key = "canary" * 7
    places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}"]
    result = yuzogpt(
        "train", *TINY, *places, "--num_workers=0", "--max_iters=5", "--wandb_log=True",
        WANDB_MODE="offline", WANDB_API_KEY=key,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(key.encode() in path.read_bytes() for path in files)
    assert key not in result.stdout + result.stderr


def test_an_evaluation_that_is_done_once_more_is_told_of_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(LocalStorage(path), -1, None)
    for step in (5, 10):
        log.write("evaluation", step, val_loss_estimate=2.0)
    log.write("train", 10, loss=2.0)
    log.close()
    MetricsLog(LocalStorage(path), 10, None).close()
    assert [r["step"] for r in read_records(path) if r["kind"] == "evaluation"] == [5, 10]
    MetricsLog(LocalStorage(path), 10, None, is_evaluated=False).close()
    found = [(r["kind"], r["step"]) for r in read_records(path)]
    assert found == [("evaluation", 5), ("train", 10)]
