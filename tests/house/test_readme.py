"""What README says exists: settings, verbs. And no file is left half merged."""

import re
import subprocess

import pytest

from tests.conftest import REPOSITORY
from yuzogpt.cli import VERBS
from yuzogpt.config.renamed import RENAMED_SETTINGS
from yuzogpt.config.resolve import leaves

README = (REPOSITORY / "README.md").read_text()
FOREIGN = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "standalone"}
OWN = {"help", "dry_run", "json", "key", "search.KEY"}  # of the command itself
# Ray's, benchmarks', lm-evaluation-harness's.
OTHERS = {"working-dir", "address", "node-ip-address", "minutes", "model_args"}


def test_every_flag_is_a_setting():
    known = {name for verb in VERBS.values() for dotted, _ in leaves(verb.schema)
             for name in (dotted, dotted.split(".")[1])} | RENAMED_SETTINGS.keys()  # fmt: skip
    named = set(re.findall(r"--([a-zA-Z][\w.-]*\w)", README))
    assert named - known - FOREIGN - OWN - OTHERS == set()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_explained(verb):
    assert f"yuzogpt {verb}" in README


def test_no_file_is_half_merged():
    command = ["git", "grep", "-nE", "^(<<<<<<<|>>>>>>>) "]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip("not a git checkout")
    assert found.stdout == ""
