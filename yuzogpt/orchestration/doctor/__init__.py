"""The doctor on a cluster: an actor on each node examines it."""
