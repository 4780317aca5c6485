"""Which settings are best? A sweep: its space, its trials, what came out, and is it worth it."""
