"""A model behind HTTP: an OpenAI-compatible API, and a page to try it on."""
