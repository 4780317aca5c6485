"""`torchrun --nproc_per_node=8 -m yuzogpt.training PRESET --key=value`: the loop without Ray."""

import sys

from yuzogpt.cli import run

run(["train", *sys.argv[1:], "--num_workers=0"])
