"""Tuning: which settings are best. A sweep has a search space, trials and an outcome."""
