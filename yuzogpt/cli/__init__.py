"""The command line: `yuzogpt VERB ... --key=value`."""

from yuzogpt.cli.entry_point import exit_status, main, run
from yuzogpt.cli.verbs import VERBS

__all__ = ["VERBS", "exit_status", "main", "run"]
