"""What tells a measurement from others, beside its cell: everything that could change its numbers."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ...integration.generation import GREEDY, end_tokens
from ...methods.registry import Method, Plan
from ...tasks.task import Task
from .provenance import digest
from .request import TokenizedExample

# Where a model lies, who wrote it and how it is attached change nothing.
_NOT_OF_THE_MODEL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_NOT_OF_THE_TOKENIZER = {"padding", "truncation"}


def short_digest(content: Any) -> str:
    """The first 16 digits of the SHA-256 of bytes, or of a value's form in JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, default=str).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


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


def forward_identity(model: Any) -> dict[str, Any]:
    """Of a model, the weights apart: what a forward depends on."""
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in _NOT_OF_THE_MODEL}
    return {"dtype": str(model.dtype).removeprefix("torch."), "config": short_digest(config)}


def task_identity(task: Task, first: TokenizedExample) -> dict[str, Any]:
    """Of a task: its first example as the model reads it, and the file that it is read from."""
    example = first.example
    asked = [first.context, first.question, example.answers, example.max_new_tokens, example.reference]
    source = getattr(task, "source", "")
    return {"first": short_digest(asked)} | ({"source": source} if source else {})


def method_identity(method: Method, plan: Plan) -> dict[str, Any]:
    """Of the files that a method reads."""
    found: dict[str, Any] = {}
    if method.shares and plan.sharing is not None:
        found["sharing"] = short_digest(plan.sharing.to_json().encode())
    return found


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
