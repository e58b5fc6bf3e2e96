"""The evaluation kit: methods answer the same examples at equal resident bytes, beside controls and an oracle.

Names are imported when they are first used, so that importing this package brings neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..methods.registry import METHODS, SharedSettings, make_method
    from .measure.evaluator import Evaluator
    from .measure.request import Request
    from .measure.results import load, pack, save_packed
    from .report.statistics import summarise
    from .report.write import write as write_report

_HOMES = {
    "METHODS": "..methods.registry",
    "Evaluator": ".measure.evaluator",
    "Request": ".measure.request",
    "SharedSettings": "..methods.registry",
    "load": ".measure.results",
    "make_method": "..methods.registry",
    "pack": ".measure.results",
    "save_packed": ".measure.results",
    "summarise": ".report.statistics",
    "write_report": ".report.write",
}

__all__ = [
    "METHODS",
    "Evaluator",
    "Request",
    "SharedSettings",
    "load",
    "make_method",
    "pack",
    "save_packed",
    "summarise",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), "write" if name == "write_report" else name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
