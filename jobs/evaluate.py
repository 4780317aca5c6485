"""Evaluate: `ray job submit --working-dir . -- python jobs/evaluate.py gpt2 --tasks=lambada`."""

import sys

from yuzogpt.cli import run

run(["evaluate", *sys.argv[1:]])
