"""Train: `ray job submit --working-dir . -- python jobs/train_gpt2.py PRESET --key=value`.

Plain `python jobs/train_gpt2.py` does the same on this machine. Without a preset: gpt2_124m.
"""

import sys

from yuzogpt.cli import run

run(["train", *sys.argv[1:]], "gpt2_124m")
