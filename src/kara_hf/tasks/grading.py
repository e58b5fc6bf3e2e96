"""From a generated text to a score in [0, 1]: right answers that occur in it, and mathematics."""

import re
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any

SECONDS = 5  # for one expression to be read, or two to be compared


def optional(module: str) -> Any:
    """A module that only the evaluation needs.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"this task needs {error.name}; install it with: pip install 'kara_hf[evaluate]'") from error


def share_found(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the text as whole words, in any case and order.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("there is no answer to look for; give at least one")
    found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers]
    return sum(map(bool, found)) / len(answers)


def mathematics(text: str, gold: str) -> float:
    """Whether the final answer of a text equals `gold` as mathematics; 1 or 0.

    That is what the last line with a \\boxed{} has in boxes, so that earlier attempts do not count; without any, it is
    what math-verify takes for the answer. It reads and compares both. What takes it longer than a few seconds counts as
    wrong; the time is kept by an alarm signal, hence only in the main thread: in others there is no such limit.

    Args:
        text: worked solution with a final answer.
        gold: right answer in LaTeX or plain, or a text that has it in \\boxed{}.

    Raises:
        ImportError: math-verify is not installed.
    """
    math_verify = optional("math_verify")
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    boxed = gold if "\\boxed" in gold else f"\\boxed{{{gold}}}"
    last = text[text.rfind("\n", 0, max(0, text.rfind("\\boxed"))) + 1 :]
    right, given = (math_verify.parse(part, parsing_timeout=seconds) for part in (boxed, last))
    return float(math_verify.verify(right, given, timeout_seconds=seconds))


def gsm8k_answer(solution: str) -> str:
    """The number behind "####" at the end of a solution of GSM8K, without commas; of others, like \\boxed{}, all."""
    _, mark, number = solution.rpartition("####")
    return number.strip().replace(",", "") if mark and "\\boxed" not in solution else solution
