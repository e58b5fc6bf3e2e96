"""Where messages of a chat are among its tokens."""

from collections.abc import Sequence
from typing import Any

_SYSTEM = ("system", "developer")


def text_around(tokenizer: Any, messages: Sequence[dict[str, Any]], number: int, **template: Any) -> tuple[str, str]:
    """What a chat template puts in front of the text of message `number`, and what behind it.

    Args:
        template: further arguments of `apply_chat_template`.

    Raises:
        ValueError: there is no template, it refuses the messages, or it leaves that one out.
    """
    mark = "(message)"
    while any(mark in str(message.get("content")) for message in messages):
        mark = f"({mark})"
    marked = [{**message, "content": mark} if n == number else message for n, message in enumerate(messages)]
    before, found, behind = rendered(tokenizer, marked, **template).partition(mark)
    if not found:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} leaves out message {number}")
    return before, behind


def rendered(tokenizer: Any, messages: Sequence[dict[str, Any]], **template: Any) -> str:
    """The text of a chat. Raises ValueError if there is no template or it refuses the messages."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **template))
    except TemplateError as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} refuses the messages: {error}") from error


def system_pin(tokenizer: Any, messages: Sequence[dict[str, Any]], **template: Any) -> list[tuple[int, int]]:
    """The true positions of a chat's system message, as `pin=` of a cache takes them: ``[(0, end)]``.

        cache = KVCompressCache(model, max_cache_tokens=512, pin=system_pin(tokenizer, messages))

    It is all that stands in front of the text of the first other message, its header among it: so are templates read
    that put a system message of their own there, or put it into the first message of the user.

    Args:
        tokenizer: with a chat template.
        messages: of the chat, each with "role" and "content"; those of the roles system and developer come first.
        template: arguments of `apply_chat_template` with which the prompt is made.

    Raises:
        ValueError: there is no template, no other message, or nothing in front of it.
    """
    first = next((n for n, message in enumerate(messages) if message["role"] not in _SYSTEM), None)
    if first is None:
        raise ValueError(f"messages={list(messages)!r} is not possible: a message of another role must come behind")
    before, _ = text_around(tokenizer, messages, first, **template)
    whole = rendered(tokenizer, messages, **template)
    prompt, part = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, before))
    pairs = zip(prompt, part, strict=False)
    end = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(part)))
    if not end:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} puts nothing in front of the first message, so there is no "
            "system message to pin"
        )
    return [(0, end)]
