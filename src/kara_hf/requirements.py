"""Packages that only some runs need, looked up before such a run starts."""

from collections.abc import Mapping
from importlib.util import find_spec


def require_packages(purpose: str, needed: Mapping[str, str]) -> None:
    """Raises ImportError if packages are missing: it names all of them, and the command that installs them.

    Args:
        purpose: what needs them, for the message.
        needed: for the name by which each is imported, what pip installs it by: a package, or an extra of this one.
    """
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        targets = dict.fromkeys(f"'{needed[name]}'" if "[" in needed[name] else needed[name] for name in missing)
        what = f"{', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise ImportError(f"{purpose} needs {what}; run: pip install {' '.join(targets)}")
