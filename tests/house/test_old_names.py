"""What README named in version e909652 still works: imports, modules, settings."""

import importlib
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from yuzogpt.cli import VERBS
from yuzogpt.config.resolve import resolve

OLD = {
    verb: settings
    for verb, *settings in map(
        str.split, (REPOSITORY / "tests/fixtures/e909652/settings.txt").read_text().splitlines()
    )
}
IMPORTS = (
    "yuzogpt.cli:run",
    "yuzogpt.orchestration.serve:application",
    "yuzogpt.orchestration.proxy:middlewares",
)
COMMANDS = ("yuzogpt", "yuzogpt.training", "yuzogpt.evaluation.harness")


@pytest.mark.parametrize("path", IMPORTS)
def test_import(path):
    module, _, name = path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_command(module):
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("verb", "dotted"), [(verb, dotted) for verb, settings in OLD.items() for dotted in settings]
)
def test_setting(verb, dotted):
    """Known by its whole name and, where no other has it, by its last part."""
    schema = VERBS[verb].schema
    for name in (dotted, dotted.partition(".")[2]):
        try:
            resolve(schema, [], [f"--{name}=no such value of any setting"])
        except Exception as error:
            assert "unknown setting" not in str(error), error
