"""What this process is: its device, cores, memory and signals, and its place among ranks."""
