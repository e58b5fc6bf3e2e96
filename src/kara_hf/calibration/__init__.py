"""Fits a score to a model: which of its keys will be looked at, told from the key alone."""
