"""Ray Train: the training loop on any number of workers."""
