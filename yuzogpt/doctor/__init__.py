"""Is a cluster sound? What each node knows, how nodes reach each other, and what follows."""
