"""The GPT: its architecture, and the initial distribution of its weights."""
