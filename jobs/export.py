"""Export to a Hugging Face folder: `ray job submit --working-dir . -- python jobs/export.py`."""

import sys

from yuzogpt.cli import run

run(["export", *sys.argv[1:]])
