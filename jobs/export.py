"""Export: `ray job submit --working-dir . -- python jobs/export.py RUN --to=huggingface DIR`."""

import sys

from yuzogpt.cli import run

run(["export", *sys.argv[1:]])
