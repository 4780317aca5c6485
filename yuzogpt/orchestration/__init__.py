"""The only folder that imports ray: the same work, spread over workers and machines."""
