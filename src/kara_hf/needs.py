"""What a run needs beside this package: packages, files and settings, looked up together before anything runs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol


def extra(name: str) -> str:
    """The command that installs what an extra of this package brings."""
    return f"pip install 'kara_hf[{name}]'"


class Need(Protocol):
    """Something that has to be there."""

    def missing(self) -> str | None:
        """What is missing and what to do, as a clause without a full stop; None if nothing is."""


@dataclass(frozen=True)
class Package(Need):
    """A package that is imported later.

    Attributes:
        module: what is imported; several, separated by "|", where one of them is enough.
        install: the command that brings it.
        name: what it is called where it is installed from, if not like the module.
    """

    module: str
    install: str
    name: str = ""

    def missing(self) -> str | None:
        if any(map(_found, self.module.split("|"))):
            return None
        return f"{self.name or self.module.partition('|')[0]} is not installed; run: {self.install}"


@dataclass(frozen=True)
class Check(Need):
    """Something that can be tried: `attempt` raises ValueError, OSError or ImportError with what is wrong."""

    attempt: Callable[[], object]

    def missing(self) -> str | None:
        try:
            self.attempt()
        except (ValueError, OSError, ImportError) as error:
            return str(error).rstrip(".")
        return None


def check_needs(needs: Mapping[str, Iterable[Need]]) -> None:
    """Looks everything up, and names all that is missing at once.

    Args:
        needs: of each method, task or whatever else is asked for, by its name; "" for the run itself.

    Raises:
        ImportError: a package is missing, and perhaps something else.
        ValueError: something else is.
    """
    found: dict[str, list[str]] = {}
    packages = False
    for owner, wanted in needs.items():
        for need in wanted:
            text = need.missing()
            if text is not None:
                packages |= isinstance(need, Package)
                owners = found.setdefault(text, [])
                if owner and owner not in owners:
                    owners.append(owner)
    if found:
        clauses = [f"{', '.join(owners)}: {text}" if owners else text for text, owners in found.items()]
        raise (ImportError if packages else ValueError)(". ".join(clauses))


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of a parent that is not there, or that was taken away
        return False
