"""`python -m yuzogpt` is `yuzogpt`."""

from yuzogpt.cli import run

run()
