"""Marks of single cases, and how many examples are drawn."""

import pytest
from hypothesis import settings


def slow(*values, **more):
    """A case of `parametrize` that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow, **more)


def few(values, *chosen):
    """Cases of `parametrize`: the `chosen` ones as they are, by value, and all others slow."""
    assert all(value in values for value in chosen)
    return [value if value in chosen else slow(*value) if isinstance(value, tuple) else slow(value) for value in values]


def most_examples(most, **more):
    """Settings of a drawn test: `most` examples in `make test-all`, and in `make test` a quarter of them."""
    return settings(max_examples=max(2, most * settings.default.max_examples // 40), **more)
