"""kvpress beside this package, in an environment of its own."""
