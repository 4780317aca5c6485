"""Train: `ray job submit --working-dir . -- python jobs/train_gpt2.py PRESET --key=value`.

Plain `python jobs/train_gpt2.py` does the same on this machine. Without a preset: gpt2_124m.
"""

import sys

from yuzogpt.cli import run

arguments = sys.argv[1:]
if all(argument.startswith("-") for argument in arguments):
    arguments = ["gpt2_124m", *arguments]
run(["train", *arguments])
