"""The command line: `yuzogpt VERB ... --key=value`."""

from yuzogpt.cli.entry_point import VERBS, main, run, status_of

__all__ = ["VERBS", "main", "run", "status_of"]
