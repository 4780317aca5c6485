"""Ray Data: corpora prepared on all nodes."""
