"""A beginner's walk: from a text to samples, each command printed by the one before."""

import re

import pytest

from tests.conftest import make_text
from tests.walks.terminal import CTRL_C, Terminal

pytestmark = pytest.mark.slow


def command_in(shown: str, verb: str) -> str:
    """Return the one command of a verb that a screen shows."""
    commands = set(re.findall(rf"yuzogpt {verb} [^`\n]*[^`\n. ]", shown))
    assert len(commands) == 1, shown
    return commands.pop()


def test_from_a_text_to_samples(tmp_path):
    (tmp_path / "poems.txt").write_text(make_text(60_000))
    with Terminal(tmp_path) as terminal:
        status, shown = terminal.run("yuzogpt prepare poems.txt")
        assert status == 0
        assert "poems" in shown
        train = command_in(shown, "train")
        assert "--dataset=poems" in train

        # The first guess of somebody who did not read that.
        status, shown = terminal.run("yuzogpt train poems")
        assert status == 2
        assert "--dataset=poems" in shown

        # Ctrl-C in the middle: nothing is lost.
        terminal.type(train)
        terminal.wait_for(r"\b\d{2,}/\d+ ")
        terminal.press(CTRL_C)
        status, shown = terminal.finish()
        assert status == 130
        kept = int(re.search(r"at step (\d+): kept", shown)[1])
        assert "Traceback" not in shown

        status, shown = terminal.run(train)
        assert status == 0
        assert f"step {kept}" in shown
        sample = command_in(shown, "sample")

        status, shown = terminal.run(sample + " --num_samples=1 --max_new_tokens=30")
        assert status == 0
        assert len(shown.splitlines()) > 2

        status, shown = terminal.run("yuzogpt list")
        assert status == 0
        assert "poems" in shown
        assert "out-poems" in shown
        assert not re.search(r"[0-9a-f]{20}", shown)  # no long hashes

        # Another text under the same name.
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "poems.txt").write_text(make_text(50_000, seed=1))
        status, shown = terminal.run("yuzogpt prepare more/poems.txt")
        assert status == 2
        assert "poems" in shown
        assert not re.search(r"[0-9a-f]{20}", shown)
