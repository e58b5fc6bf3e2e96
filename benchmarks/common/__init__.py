"""What all benchmarks share: cases and runs, rows and tables, races and models."""
