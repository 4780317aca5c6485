"""Serve a model: `ray job submit --working-dir . -- python jobs/serve.py RUN --key=value`.

It serves until the job is stopped; cluster/serve.yaml is for a service that outlives commands.
"""

import sys

from yuzogpt.cli import run

run(["serve", *sys.argv[1:]])
