"""Check a cluster: `ray job submit --working-dir . -- python jobs/doctor.py --key=value`."""

import sys

from yuzogpt.cli import run

run(["doctor", *sys.argv[1:]])
