"""Synthetic problems with known answers, for judging what a compressed cache still remembers."""

from kara_hf.evaluation.reasoner import SYMBOLS, TASKS, VOCABULARY, Problem, Task, make_problem, split_of

__all__ = ["SYMBOLS", "TASKS", "VOCABULARY", "Problem", "Task", "make_problem", "split_of"]
