"""Marks of single cases."""

import pytest


def slow(*values, **more):
    """A case of `parametrize` that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow, **more)
