"""What tells a measurement from others, beside its cell: everything that could change its numbers."""

import json
from pathlib import Path
from typing import Any

from ...integration.adapter import adapter_identity
from ...integration.generation import GREEDY, end_tokens
from ...integration.identity import forward_identity, short_digest
from ...methods.registry import Method, Plan
from ...tasks.task import Task
from .provenance import digest
from .request import TokenizedExample

_NOT_OF_THE_TOKENIZER = {"padding", "truncation"}


def model_identity(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Of a model and its tokenizer, the weights apart: what an answer depends on; see `forward_identity`.

    `generation` is what the kit generates by; of the model's own `generation_config` it holds the ends, and no other
    field of it changes an answer.
    """
    return {
        **forward_identity(model),
        "tokenizer": _tokenizer_digest(tokenizer),
        "generation": {**GREEDY, "eos_token_id": end_tokens(model)},
    }


def task_identity(task: Task, first: TokenizedExample) -> dict[str, Any]:
    """Of a task: its first example as the model reads it, and the file that it is read from."""
    example = first.example
    asked = [first.context, first.question, example.answers, example.max_new_tokens, example.reference]
    source = getattr(task, "source", "")
    return {"first": short_digest(asked)} | ({"source": source} if source else {})


def method_identity(method: Method, plan: Plan, model: Any) -> dict[str, Any]:
    """Of the files that a method reads: a sharing map, and the adapter that the model learned for it."""
    if not method.shares or plan.sharing is None:
        return {}
    found = {"sharing": short_digest(plan.sharing.to_json().encode())}
    adapter = adapter_identity(model)
    return found | ({"adapter": adapter} if adapter else {})


def weights_of(model: Any, place: str | Path) -> str:
    """What tells these weights from others: a digest of a folder's files, or the revision that a hub gave."""
    folder = Path(place)
    if folder.is_dir():
        try:
            return digest(folder)
        except FileNotFoundError:
            return "unknown"
    return str(getattr(model.config, "_commit_hash", None) or "unknown")


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = tokenizer.get_vocab()
    else:
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in _NOT_OF_THE_TOKENIZER}
    return short_digest([type(tokenizer).__name__, rules, tokenizer.special_tokens_map, tokenizer.chat_template])
