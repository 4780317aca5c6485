"""Bench: `ray job submit --working-dir . -- python jobs/bench.py gpt2_124m --storage=/shared`.

How it scales over a cluster's nodes: `--launchers=ray --world_sizes=1,2,4`.
"""

import sys

from yuzogpt.cli import run

run(["bench", *sys.argv[1:]])
