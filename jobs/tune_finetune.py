"""Sweep: `ray job submit --working-dir . -- python jobs/tune_finetune.py PRESET --key=value`.

Plain `python jobs/tune_finetune.py` does the same on this machine. Without a preset:
finetune_shakespeare.
"""

import sys

from yuzogpt.cli import run

run(["tune", *sys.argv[1:]], "finetune_shakespeare")
