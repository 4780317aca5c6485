"""Serve a model: `ray job submit --working-dir . -- python jobs/serve.py RUN --key=value`.

It serves until the job is stopped. For a service that outlives the command: cluster/serve.yaml.
"""

import sys

from yuzogpt.cli import run

run(["serve", *sys.argv[1:]])
