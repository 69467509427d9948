"""What benchmarks need to know of each model family: one module for each, one line in `registry`."""
