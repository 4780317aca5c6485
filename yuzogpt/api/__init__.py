"""The Python API; the command line is built on it. verbs.py: from settings to what was done."""
