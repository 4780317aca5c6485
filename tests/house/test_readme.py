"""What README and docs say exists: settings, verbs. And no file is left half merged."""

import re
import subprocess

import pytest

from tests.conftest import REPOSITORY
from tests.docs.pages import GENERATED, PAGES, README, name_of
from yuzogpt.cli import VERBS
from yuzogpt.config.resolve import leaves

FOREIGN = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "standalone"}
# Of the command itself.
OWN = {"help", "dry_run", "log_level", "json", "key", "version", "search.KEY"}
# Ray's, benchmarks', lm-evaluation-harness's, curl's.
OTHERS = {
    "data",
    "fail",
    "header",
    "silent",
    "working-dir",
    "address",
    "node-ip-address",
    "minutes",
    "model_args",
}


# Those of cluster/ and benchmarks/ are other programs', too; tests/cluster parses the first.
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "README.md" or p == README], ids=name_of
)
def test_every_flag_is_a_setting(page):
    known = {name for verb in VERBS.values() for dotted, _ in leaves(verb.schema)
             for name in (dotted, dotted.split(".")[1])}  # fmt: skip
    named = set(re.findall(r"--([a-zA-Z][\w.-]*\w)", page.read_text()))
    assert named - known - FOREIGN - OWN - OTHERS == set()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_explained(verb):
    assert f"yuzogpt {verb}" in README.read_text()
    assert f"## yuzogpt {verb}\n" in GENERATED.read_text()


def test_no_file_is_half_merged():
    command = ["git", "grep", "-nE", "^(<<<<<<<|>>>>>>>) "]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip("not a git checkout")
    assert found.stdout == ""


def test_ten_files_lead_from_tokens_to_a_step():
    """README lists them; each names the next one in its docstring."""
    section = README.read_text().partition("## Reading the code")[2].partition("\n## ")[0]
    files = re.findall(r"\]\((yuzogpt/[\w/]+\.py)\)", section)
    assert len(files) == 10
    texts = [(REPOSITORY / file).read_text() for file in files]
    assert sum(text.count("\n") for text in texts) <= 1500
    for text, following in zip(texts, files[1:], strict=False):
        docstring = text.partition('"""')[2].partition('"""')[0]
        assert f"Next: {following.removeprefix('yuzogpt/')}" in docstring
