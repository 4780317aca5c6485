"""`yuzogpt bench`: what a training step costs on this machine."""
