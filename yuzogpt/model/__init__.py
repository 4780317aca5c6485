"""The GPT: its architecture, how its weights start, and GPT-2's checkpoints in and out."""
