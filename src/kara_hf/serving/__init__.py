"""Kara inside Transformers' own continuous batching: more requests in the same memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ServingConfig
    from .metrics import ServingMetrics
    from .session import Serving, kara_continuous_batching

_PLACES = {
    "Serving": "session",
    "ServingConfig": "config",
    "ServingMetrics": "metrics",
    "kara_continuous_batching": "session",
}
__all__ = ["Serving", "ServingConfig", "ServingMetrics", "kara_continuous_batching"]


def __getattr__(name: str) -> Any:
    """Loads what is asked for, so that the command's help does not wait for torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
