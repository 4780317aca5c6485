"""Prepare a corpus: `ray job submit --working-dir . -- python jobs/prepare.py ...`."""

import sys

from yuzogpt.cli import run

run(["prepare", *sys.argv[1:]])
