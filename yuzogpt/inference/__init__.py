"""A model and prompts -> text: an engine that decodes many requests at a time."""
