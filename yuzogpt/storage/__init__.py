"""Where bytes live, and how those of others are read."""
