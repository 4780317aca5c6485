"""Evaluation: the loss of a model on held-out text, and its metrics on benchmarks."""
