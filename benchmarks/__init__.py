"""Benchmarks: `python -m benchmarks list` says what there is, `python -m benchmarks run NAME` measures it."""
