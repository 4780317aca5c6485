"""What a run did, for a person: read `history.py` first, then `summary.py`."""
