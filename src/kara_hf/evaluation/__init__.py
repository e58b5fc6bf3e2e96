"""The evaluation kit: methods answer the same examples, or read the same documents, at equal resident bytes, beside
controls and an oracle.

Names are imported when they are first used, so that importing this package brings neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..methods.registry import METHODS, SharedSettings, make_method
    from .measure.diverged import load_divergence
    from .measure.divergence import divergence
    from .measure.evaluator import Evaluator
    from .measure.forced import Document
    from .measure.request import Request
    from .measure.results import load, pack, save_packed
    from .report.statistics import summarise
    from .report.write import write as write_report
    from .report.write import write_divergence

_HOMES = {
    "METHODS": "..methods.registry",
    "Document": ".measure.forced",
    "Evaluator": ".measure.evaluator",
    "Request": ".measure.request",
    "SharedSettings": "..methods.registry",
    "divergence": ".measure.divergence",
    "load": ".measure.results",
    "load_divergence": ".measure.diverged",
    "make_method": "..methods.registry",
    "pack": ".measure.results",
    "save_packed": ".measure.results",
    "summarise": ".report.statistics",
    "write_divergence": ".report.write",
    "write_report": ".report.write",
}

__all__ = [
    "METHODS",
    "Document",
    "Evaluator",
    "Request",
    "SharedSettings",
    "divergence",
    "load",
    "load_divergence",
    "make_method",
    "pack",
    "save_packed",
    "summarise",
    "write_divergence",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), "write" if name == "write_report" else name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
