"""Tasks with known answers: synthetic ones for any tokenizer, published ones, and those of the bundled model."""

from . import english, published, reasoner_tasks  # noqa: F401  they register their tasks
from .task import Example, Task, make_task, register_task

__all__ = ["Example", "Task", "make_task", "register_task"]
