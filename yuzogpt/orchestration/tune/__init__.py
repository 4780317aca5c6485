"""Ray Tune: the trials of a sweep."""
