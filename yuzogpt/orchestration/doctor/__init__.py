"""The doctor on a cluster: each node is examined by a task of its own."""
