"""This package beside others on one real model: speed, memory and answers, each in an environment of its own."""
