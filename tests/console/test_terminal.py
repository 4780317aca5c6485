"""Text from others cannot control a terminal; files and pipes get it unchanged."""

import ast
import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from tests.checkpoints.files import write_checkpoint
from tests.conftest import REPOSITORY, prepare_char_corpus
from tests.inference.engines import small_model
from yuzogpt import checkpoints, tokenization
from yuzogpt.cli import exit_status
from yuzogpt.config import TrainSettings
from yuzogpt.console import terminal
from yuzogpt.tuning.table import TrialTable

# Sets the clipboard; clears the screen, in C0 and in C1; goes back to the line's beginning.
HOSTILE = "\x1b]52;c;cm0gLXJmIH4=\x07 \x1b[2J \x9b2J \x9d0;title\x9c \rover\x08\x7f"
SHOWN = r"\x1b]52;c;cm0gLXJmIH4=\x07 \x1b[2J \x9b2J \x9d0;title\x9c \x0dover\x08\x7f"


def assert_clean(text: str) -> None:
    """Allow rich's and tqdm's own: colours, and where the cursor is."""
    own = re.sub(r"\x1b\[[\d;?]*[mKAGhl]|\r", "", text)
    assert terminal.CONTROL.findall(own) == []


def on_terminal(*arguments: str, answers: str = "") -> tuple[int, str]:
    """Run the command line on a terminal of its own; return its status and what that shows."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", *arguments],
        stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    assert process.stdin
    with process.stdin:
        process.stdin.write(answers.encode())
    found = b""
    with contextlib.suppress(OSError):  # EIO: nobody has it open any more
        while piece := os.read(ours, 65536):
            found += piece
    os.close(ours)
    return process.wait(60), found.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """A run whose alphabet has all of it, and which always repeats the last character."""
    tokenizer = tokenization.CharTokenizer.from_text(HOSTILE + "\nabc")
    model = small_model(1, vocab_size=tokenizer.vocab_size)
    settings = TrainSettings.model_validate({"model": model.settings.model_dump()})
    state = checkpoints.State(1, 1, settings.model_dump(), "none", "none", {})
    run = tmp_path_factory.mktemp("hostile") / "run"
    write_checkpoint(run, state, model.state_dict(), {}, tokenization.to_bytes(tokenizer))
    return run


@pytest.mark.slow
def test_a_model_cannot_steer_the_terminal_and_a_pipe_gets_every_byte(hostile_run):
    flags = [f"--out_dir={hostile_run}", "--num_samples=1", "--max_new_tokens=40", "--device=cpu"]
    command = ["sample", *flags, f"--start={HOSTILE}"]
    status, shown = on_terminal(*command)
    assert status == 0
    assert_clean(shown)
    loading, shown = shown.split("\n", 1)
    assert loading.endswith("hostile0/run ...")
    assert shown.startswith(SHOWN)
    call = [sys.executable, "-m", "yuzogpt", *command]
    piped = subprocess.run(call, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True).stdout.decode()
    assert piped.startswith(HOSTILE)
    assert terminal.visible(piped) == shown
    line = HOSTILE.replace("\r", "")
    status, shown = on_terminal("sample", *flags, "--interactive=True", answers=f"{line}\nzzz\n")
    assert status == 0
    assert_clean(shown)
    loading, shown = shown.split("\n", 1)
    assert loading.startswith("loading model ")
    assert shown.startswith(terminal.visible(line))
    assert "no id for 'z'" in shown


def test_a_corpus_cannot_steer_the_terminal(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text(f"{HOSTILE} and some more of it\n" * 40, newline="")
    corpus = prepare_char_corpus(source, tmp_path / "corpus")
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["source"]["name"] += HOSTILE
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    status, shown = on_terminal("inspect", str(corpus))
    assert status == 0, shown
    assert_clean(shown)
    assert shown.count(r"\x1b]52;c;cm0gLXJmIH4=\x07") > 1


def test_an_error_is_one_line_whatever_a_file_is_called(hostile_run, tmp_path, capfd):
    folder = tmp_path / "a\nb\x1b[2J\x9b2J"
    folder.mkdir()
    (folder / "x").write_text("")
    for command in (
        ["sample", f"--out_dir={hostile_run}", f"--start=FILE:{folder / 'x'}.txt"],
        ["report", str(folder)],
        ["inspect", str(folder)],
        ["train", str(folder / "x.yaml")],
        ["evaluate", str(folder)],
        ["export", str(folder)],
        ["serve", str(folder)],
        [f"{folder}"],
    ):
        assert exit_status(command) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert r"a\nb\x1b[2J\x9b2J" in said, command
        assert_clean(said)


class Terminal:
    """A terminal that this process writes to: its stdout until `shown` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, theirs = pty.openpty()
        self.file = os.fdopen(theirs, "w")
        self.found = b""
        self.reading = threading.Thread(target=self.read)
        self.reading.start()
        monkeypatch.setattr(sys, "stdout", self.file)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "200")

    def read(self) -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(self.ours, 65536):
                self.found += piece

    def shown(self) -> str:
        self.file.close()
        self.reading.join()
        os.close(self.ours)
        return self.found.decode()


def test_a_table_that_changes_is_clean_too(monkeypatch):
    here = Terminal(monkeypatch)
    with TrialTable(HOSTILE, 10) as board:
        board.mark_started("0000", {"data.dataset": HOSTILE})
        board.mark_ended("0000", "failed", HOSTILE)
    terminal.console().print(HOSTILE, markup=False)
    terminal.say(HOSTILE)
    shown = here.shown()
    assert_clean(shown)
    assert "failed" in shown
    assert shown.count(r"\x1b]52;c;") >= 4


def test_what_is_visible_stays_as_it_is():
    text = "a\tb\nc \u2028 \u00e9 \N{SNOWMAN} \\x1b"
    assert terminal.visible(text) == text
    assert terminal.visible(terminal.visible(HOSTILE)) == terminal.visible(HOSTILE) == SHOWN
    assert terminal.in_one_line("a\nb\n") == r"a\nb"


def test_everything_that_is_printed_is_cleaned_in_one_place():
    """Only constants may be printed without it, and nothing by a console of its own."""
    guilty = []
    for path in (REPOSITORY / "yuzogpt").rglob("*.py"):
        if path == REPOSITORY / "yuzogpt/console/terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            if called == "Console" or (
                called == "print" and not all(isinstance(one, ast.Constant) for one in node.args)
            ):
                guilty.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    assert guilty == []


@pytest.mark.parametrize(
    ("level", "expected"),
    [("debug", ["did", "does", "odd", "end"]), ("info", ["did", "does", "odd", "end"]),
     ("warning", ["did", "odd", "end"]), ("error", ["did", "end"])],
)  # fmt: skip
def test_a_level_leaves_out_notes_and_warnings_but_no_answer(level, expected):
    program = """if True:
        import sys
        from yuzogpt.console import terminal

        terminal.set_log_level(sys.argv[1])
        terminal.say("did")
        terminal.note("does")
        terminal.complain("odd")
        terminal.report_error("end")
    """
    command = [sys.executable, "-c", program, level]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ended.stdout.split() + ended.stderr.split() == expected
    assert "odd" not in ended.stdout


def test_a_level_that_does_not_exist_is_a_mistake(capsys):
    assert exit_status(["train", "--log_level=loud"]) == 2
    assert "--log_level=loud: choose one of debug, info" in capsys.readouterr().err


def test_another_program_silences_the_package():
    """As it silences any library."""
    program = """if True:
        import logging
        from yuzogpt.console import terminal

        logging.getLogger("yuzogpt").setLevel("ERROR")
        terminal.note("does")
        terminal.complain("odd")
    """
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ended.stdout + ended.stderr == ""


WORDS = ("from\nstep", "cause", "", "tokens redone")
CELLS = [("303", "no [disk] was left on the whole machine", "a.b", "1,234"), ("7", "x", "", "0")]


@pytest.mark.parametrize("width", [12, 30, 50, 51, 52, 60, 100])
def test_a_table_is_whole_on_a_terminal_of_any_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    drawn = terminal.table(WORDS, CELLS, numeric=WORDS, prose=("cause",), title="A title")
    terminal.console().print(drawn)
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert max(map(len, lines)) <= width
    assert ("\u2500" in "".join(lines)) == (drawn.needed <= width)
    shown = "".join("".join(lines).split())
    assert "\u2026" not in shown
    for cell in (cell for row in CELLS for cell in row if cell != CELLS[0][1]):
        assert cell in shown
    if width >= 30:
        words = [word for line in lines for word in line.split()]
        for word in CELLS[0][1].split():
            assert word in words


def test_a_level_that_a_program_has_set_stays():
    program = "import logging; logging.getLogger('yuzogpt').setLevel('WARNING')\n"
    program += "from yuzogpt.console.terminal import LOGGER; print(LOGGER.level)"
    call = [sys.executable, "-c", program]
    said = subprocess.run(call, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, text=True)
    assert said.stdout == "30\n"
