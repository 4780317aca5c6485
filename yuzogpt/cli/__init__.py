"""The command line: `yuzogpt VERB ... --key=value`."""

from yuzogpt.cli.entry_point import VERBS, exit_status, main, run

__all__ = ["VERBS", "exit_status", "main", "run"]
