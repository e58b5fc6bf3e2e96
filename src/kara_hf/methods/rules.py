"""Rules: what a method may compress. Old spellings are read, with a warning where somebody writes one."""

import warnings
from typing import Literal

Rule = Literal["prompt-kept", "query-aware", "query-agnostic"]
PROMPT_KEPT: Rule = "prompt-kept"
QUERY_AWARE: Rule = "query-aware"
QUERY_AGNOSTIC: Rule = "query-agnostic"

RULES: dict[str, str] = {
    PROMPT_KEPT: "the prompt is kept whole, what is generated is compressed",
    QUERY_AWARE: "the prompt is compressed, the question in it",
    QUERY_AGNOSTIC: "the context is compressed, then the question is asked",
}
SINGLE_TEXT_RULES = (PROMPT_KEPT, QUERY_AWARE)  # of a text of which nobody says where its question begins
OLD_SPELLINGS: dict[str, str] = {"pinned": PROMPT_KEPT, "before": QUERY_AWARE, "after": QUERY_AGNOSTIC}


def rule_named(name: str) -> str:
    """The rule that a name stands for, which may be an old spelling; other names are returned as they are."""
    if name in OLD_SPELLINGS:
        new = OLD_SPELLINGS[name]
        warnings.warn(f"the rule {name!r} is called {new!r} now", DeprecationWarning, stacklevel=3)
        return new
    return name
