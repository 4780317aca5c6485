"""`yuzogpt bench`: what a training step costs on this hardware, and what it could cost."""
