"""Measuring: requests, the evaluator, equal bytes, memory, results and what they come from."""
