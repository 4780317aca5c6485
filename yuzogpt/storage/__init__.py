"""Files, object stores and leases; files of others are checked before they are read."""
