"""Evaluation: what a model's loss is on text that it was not trained on."""
