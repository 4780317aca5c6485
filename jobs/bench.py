"""Bench: `ray job submit --working-dir . -- python jobs/bench.py gpt2_124m --launchers=ray`."""

import sys

from yuzogpt.cli import run

run(["bench", *sys.argv[1:]])
