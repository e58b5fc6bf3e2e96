"""What a request must be to reach the engine's thread: anything that would raise there is refused here."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from operator import index
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from ..config import is_int, is_number
from ..integration.attach import decoder_config


class RequestRefused(ValueError):
    """A request that cannot be answered, with the reason and the remedy; others are not touched."""


@dataclass(frozen=True)
class Limits:
    """What a model and a pool can take.

    Attributes:
        vocabulary: token ids are below it.
        capacity: tokens that the pool holds.
        positions: that the model was made for, or None where nothing is said.
        position_table: whether they are rows of a table, so that there is nothing behind the last one.
    """

    vocabulary: int
    capacity: int
    positions: int | None = None
    position_table: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, capacity: int) -> Self:
        """Those of a causal LM over a pool of `capacity` tokens."""
        config: Any = decoder_config(model)
        positions = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        table = positions is not None and any(
            isinstance(module, torch.nn.Embedding)
            and module is not model.get_input_embeddings()
            and 0 <= module.num_embeddings - positions <= 2  # some keep a row or two for padding
            for module in model.modules()
        )
        if rope.get("rope_type") == "dynamic":  # goes on behind the positions it was trained for
            positions = None
        return cls(config.vocab_size, capacity, positions, table)

    def check(self, tokens: Sequence[int], max_new_tokens: int | None) -> None:
        """Refuses what an engine could not compute.

        Args:
            tokens: the prompt's ids.
            max_new_tokens: of the answer at most; None: as many as there is room for.

        Raises:
            RequestRefused: the prompt is empty or has an id that the model does not know; the answer has no positive
                length; together they are longer than the model's table of positions.
        """
        if not len(tokens):
            raise RequestRefused("the prompt has no tokens; give at least one")
        for token in tokens:
            if not _is_index(token) or not 0 <= token < self.vocabulary:
                raise RequestRefused(
                    f"the prompt has {token!r} among its ids, which must be whole numbers from 0 to "
                    f"{self.vocabulary - 1}; tokenize it with the model's own tokenizer"
                )
        if max_new_tokens is not None and not (is_int(max_new_tokens) and max_new_tokens >= 1):
            raise RequestRefused(f"max_new_tokens={max_new_tokens!r} is not possible: it must be a number from 1 on")
        if self.position_table:
            self.check_positions(len(tokens), max_new_tokens)

    def check_room(self, tokens: int) -> None:
        """Raises RequestRefused if a prompt of which so many tokens are to be stored is longer than the pool."""
        if tokens + 1 > self.capacity:
            raise RequestRefused(
                f"the request needs room for {tokens + 1} tokens and the pool holds {self.capacity}; give the "
                "engine more memory (num_blocks), or shorten the prompt"
            )

    def check_positions(self, prompt: int, max_new_tokens: int | None) -> None:
        """Raises RequestRefused if a prompt of that many tokens and its answer pass the model's last position."""
        if self.positions is None:
            return
        if prompt >= self.positions:
            raise RequestRefused(
                f"the prompt has {prompt} tokens and the model {self.positions} positions, some of which an "
                "answer needs; shorten the prompt"
            )
        if max_new_tokens is None or prompt + max_new_tokens > self.positions:
            length = "no limit" if max_new_tokens is None else f"up to {max_new_tokens} tokens"
            raise RequestRefused(
                f"a prompt of {prompt} tokens and an answer of {length} pass the model's {self.positions} positions; "
                f"ask for {self.positions - prompt} tokens or less (max_new_tokens), or shorten the prompt"
            )


def _is_index(token: Any) -> bool:
    try:
        index(token)
    except TypeError:
        return False
    return True


def check_sampling(settings: dict[str, Any]) -> None:
    """Raises RequestRefused where a setting of the engine's logits processors would make scores infinite or NaN."""
    for name, value in settings.items():
        low, high = {"temperature": (0.01, 100.0), "top_p": (0.0, 1.0), "top_k": (1, 2**31 - 1)}.get(
            name, (float("-inf"), float("inf"))
        )
        if is_number(value) and not (isfinite(value) and low <= value <= high):
            raise RequestRefused(f"{name}={value!r} is not possible: {name} must be from {low} to {high}")
