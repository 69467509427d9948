"""Side-by-side measurements: `python -m benchmarks NAME [--json FILE]`. `--help` lists the names."""
