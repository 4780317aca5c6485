"""Sample from a checkpoint: `ray job submit --working-dir . -- python jobs/sample.py ...`."""

import sys

from yuzogpt.cli import run

run(["sample", *sys.argv[1:]])
