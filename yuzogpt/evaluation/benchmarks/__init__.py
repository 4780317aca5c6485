"""The benchmarks: their files, their formats, and what is computed of them."""
