"""Bench: `ray job submit --working-dir . -- python jobs/bench.py gpt2_124m --storage=/shared`.

Scaling over the nodes of a cluster: `--launchers=ray --world_sizes=1,2,4`.
"""

import sys

from yuzogpt.cli import run

run(["bench", *sys.argv[1:]])
