"""The benchmarks: their files, their formats, and their metrics."""
