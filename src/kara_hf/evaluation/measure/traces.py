"""A model's own traces: what it says to prompts with the full cache, made once and kept, to be replayed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from ...config import is_int, is_number, require
from ...integration.generation import generate, greedy, pad_token
from ...integration.identity import short_digest
from .forced import Document
from .identity import model_identity
from .provenance import provenance
from .results import Cell, CellFile, Lines, read_lines

LINES = Lines({"number": int, "asked": str, "prompt": int}, text="ids", suffix=".traces")
LEAST = 2  # tokens of an answer that can be replayed


def own_traces(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    out: str | Path,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 8,
    data: str = "prompts",
    name: str = "model",
    weights: str = "unknown",
    progress: Callable[[int], object] = lambda done: None,
) -> list[Document]:
    """Answers of the model with its full cache, up to its end tokens, each behind its prompt.

    They are kept in `out`; what is there already is not made again.

    Args:
        model, tokenizer: a Transformers causal LM in evaluation mode.
        prompts: token ids of each.
        tokens: of an answer, at most.
        temperature: at which tokens are drawn; 0 takes the likeliest.
        seed: of what is drawn.
        batch: prompts that are answered together.
        data, name, weights: of the prompts and the model, in results.
        progress: called with the number of traces made since the last call.

    Raises:
        ValueError: something asked is not possible, an answer is too short to be replayed, or `out` holds traces of
            other prompts or settings.
    """
    require(len(prompts) > 0, "prompts", list(prompts), "at least one")
    require(is_int(tokens) and tokens >= LEAST, "tokens", tokens, f"a whole number from {LEAST} on")
    require(is_number(temperature) and temperature >= 0, "temperature", temperature, "a number from 0 on")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if limit is not None and longest + tokens > limit:
        raise ValueError(
            f"tokens={tokens} is not possible behind a prompt of {longest}: the model has {limit} positions; lower it"
        )
    cell = Cell(name, weights, f"traces:{data}", "none", "full", 1.0, "bytes", seed)
    settings = {"tokens": tokens, "temperature": temperature, "model": model_identity(model, tokenizer)}
    file = CellFile(out, cell, settings, provenance(str(model.device)), lines=LINES)
    asked = [short_digest(list(map(int, prompt))) for prompt in prompts]
    made = _held(file, asked)
    progress(len(made))
    missing = [number for number in range(len(prompts)) if number not in made]
    for first in range(0, len(missing), batch):
        numbers = missing[first : first + batch]
        answers = _answers(model, tokenizer, [prompts[number] for number in numbers], tokens, temperature, seed + first)
        lines: list[dict[str, Any]] = [
            {
                "number": number,
                "asked": asked[number],
                "prompt": len(prompts[number]),
                "ids": [*map(int, prompts[number]), *answer],
            }
            for number, answer in zip(numbers, answers, strict=True)
        ]
        file.append(lines)
        made |= {line["number"]: line for line in lines}
        progress(len(numbers))
    short = [number for number, line in made.items() if len(line["ids"]) < line["prompt"] + LEAST]
    if short:
        raise ValueError(
            f"the model answers prompt {min(short)} with fewer than {LEAST} tokens, which leaves nothing to replay; "
            "leave it out, or ask in the model's chat template"
        )
    return [Document(made[number]["ids"], made[number]["prompt"]) for number in range(len(prompts))]


def _held(file: CellFile, asked: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The traces that are there already, by number. Raises ValueError if they are of other prompts."""
    held = {line["number"]: line for line in read_lines(file.path, LINES)[0][1:] if line["number"] < len(asked)}
    for number, line in held.items():
        if line["asked"] != asked[number]:
            raise ValueError(
                f"{file.path} holds the answer to another prompt {number}; choose another folder, or remove the file "
                "to generate again"
            )
    return held


@torch.inference_mode()
def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, seed: int
) -> list[list[int]]:
    """Ids of each answer, its end token included."""
    config = greedy(model, tokenizer, max_new_tokens=tokens)
    if temperature:
        config.update(do_sample=True, temperature=float(temperature), top_k=0, top_p=1.0)
    width, pad = max(map(len, prompts)), pad_token(model, tokenizer)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    cache = DynamicCache(config=model.config)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        new = generate(model, cache, config, input_ids=ids, attention_mask=mask)[:, width:].tolist()
    ends = set(config.eos_token_id or [])
    stops = [next((place + 1 for place, token in enumerate(row) if token in ends), len(row)) for row in new]
    return [row[:stop] for row, stop in zip(new, stops, strict=True)]
