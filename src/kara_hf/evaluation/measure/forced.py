"""Documents that are forced through a model: what every cache makes of each token, beside the full cache.

All caches read a document in lockstep, a step of tokens after the other. So its prompt and the full cache are read
once for all of them, and logits of one step are all that ever lies in memory. Documents of one shape are read as a
batch: a cache that can be replayed only a few tokens at a time costs little more than others then.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ...cache.compressed import CompressedCache
from ...config import is_int, require
from ...integration.attach import attach
from ...integration.generation import for_forward, read_prompt
from ...integration.reading import Reading
from .memory import held_bytes


@dataclass(frozen=True)
class Document:
    """Token ids of a text.

    Attributes:
        ids: all of them.
        prompt: how many of them are read at once before the rest is forced.

    Raises:
        ValueError: behind the prompt there are fewer than two tokens, or there is none in it.
    """

    ids: Sequence[int]
    prompt: int

    def __post_init__(self) -> None:
        possible = is_int(self.prompt) and 1 <= self.prompt <= len(self.ids) - 2
        least = f"from 1 to {len(self.ids) - 2}, with two tokens behind it in a document of {len(self.ids)}"
        require(possible, "prompt", self.prompt, least)

    @property
    def forced(self) -> int:
        """Tokens that are forced: all behind the prompt but the last, which is only predicted."""
        return len(self.ids) - self.prompt - 1


@dataclass(frozen=True)
class Outcome:
    """What came of reading a document with one cache. Arrays have an entry for each forced token.

    Attributes:
        kl: KL(full cache || this one) of the next token's probabilities, in nats, float32.
        same: whether both find the same token likeliest, bool.
        loss: of the text's own next token, in nats, float32.
        full_loss: the same with the full cache.
        resident_bytes: held at most, of a batch a document's share; while the prompt is read, whole, is left out.
        end_bytes: held at the end.
        full_bytes: what the full cache holds at the end, and at most.
        seconds: that reading took, the prompt included; this and the bytes are a document's share of its batch.
    """

    kl: np.ndarray
    same: np.ndarray
    loss: np.ndarray
    full_loss: np.ndarray
    resident_bytes: int
    end_bytes: int
    full_bytes: int
    seconds: float


class Forced:
    """A cache into which a batch of documents is read.

    Attributes:
        most: bytes held at most behind a forward, that of the prompts left out.
        seconds: that its forwards took.
    """

    def __init__(self, model: Any, cache: Cache):
        self.model, self.cache, self.most, self.seconds = model, cache, 0, 0.0

    def begin(self, prompts: torch.Tensor, reading: Reading) -> None:
        """Takes up the prompts ``[B, P]`` from their `reading`, or reads them."""
        if reading.fits(self.cache):
            start = time.perf_counter()
            reading.into(self.cache)
            self.seconds += time.perf_counter() - start + reading.seconds
        else:
            self._timed(read_prompt, self.model, self.cache, prompts)

    def logits(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits behind each of the `tokens` ``[B, S]``, as decoding one by one gives them, in parts ``[B, s, V]``.

        A compressed cache gets no more tokens at once than it replays exactly.
        """
        cache, at = self.cache, 0
        with cache.replaying() if isinstance(cache, CompressedCache) else nullcontext():
            while at < tokens.shape[1]:
                most = cache.replayable if isinstance(cache, CompressedCache) else tokens.shape[1]
                part = tokens[:, at : at + most]
                found = self._timed(self._forward, part)
                at += part.shape[1]
                self.most = max(self.most, held_bytes(cache))
                yield found

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens, **for_forward(self.model, self.cache)).logits
        return logits

    def _timed(self, forward: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
        start = time.perf_counter()
        logits = forward(*given)
        if logits.device.type == "cuda":
            torch.cuda.synchronize(logits.device)
        self.seconds += time.perf_counter() - start
        return logits


@torch.inference_mode()
def read_together(
    model: Any,
    documents: Sequence[Document],
    makers: Sequence[Callable[[], Cache]],
    *,
    step: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[list[Outcome]]:
    """Reads documents of one shape with the full cache and, beside it, with a cache from each of `makers`.

    Args:
        model: a Transformers causal LM in evaluation mode.
        documents: all with as many tokens, in the prompt and behind it.
        step: tokens of each document whose logits lie in memory at once.
        progress: called with the tokens of a document that all caches read since the last call.

    Returns:
        For each maker an outcome for each document.

    Raises:
        ValueError: the model does not support a cache.
    """
    caches = [make() for make in makers]  # some detach the model, which is attached again for the others
    held = attach(model) if any(isinstance(cache, CompressedCache) for cache in caches) else nullcontext()
    ids = torch.tensor([list(document.ids) for document in documents], device=model.device)
    batch, prompt, count = len(documents), documents[0].prompt, documents[0].forced
    kl, same, loss = (torch.zeros(len(caches), batch, count) for _ in range(3))
    full_loss = torch.zeros(batch, count)
    with held:
        full = Forced(model, DynamicCache(config=model.config))
        others = [Forced(model, cache) for cache in caches]
        prompts = ids[:, :prompt]
        reading = Reading(model, prompts, torch.ones_like(prompts))
        for reader in (full, *others):
            reader.begin(prompts, reading)
        del reading  # which holds queries, keys and values of all layers
        progress(prompt)
        for first in range(0, count, step):
            here = slice(first, min(first + step, count))
            tokens, following = (ids[:, prompt + by + here.start : prompt + by + here.stop] for by in (0, 1))
            (found,) = full.logits(tokens)
            expected = found.float().log_softmax(-1)
            shares, likeliest = expected.exp(), expected.argmax(-1)
            full_loss[:, here] = -expected.gather(-1, following[..., None])[..., 0].cpu()
            for number, reader in enumerate(others):
                at = 0
                for found in reader.logits(tokens):
                    part = slice(at, at + found.shape[1])
                    there, at = slice(first + part.start, first + part.stop), part.stop
                    logs = found.float().log_softmax(-1)
                    kl[number, :, there] = _divergence(expected[:, part], shares[:, part], logs).cpu()
                    same[number, :, there] = (logs.argmax(-1) == likeliest[:, part]).float().cpu()
                    loss[number, :, there] = -logs.gather(-1, following[:, part, None])[..., 0].cpu()
            progress(here.stop - here.start)
    full_bytes = held_bytes(full.cache)
    return [
        [
            Outcome(
                kl=kl[number, b].numpy(),
                same=same[number, b].bool().numpy(),
                loss=loss[number, b].numpy(),
                full_loss=full_loss[b].numpy(),
                resident_bytes=reader.most // batch,
                end_bytes=held_bytes(reader.cache) // batch,
                full_bytes=full_bytes // batch,
                seconds=reader.seconds / batch,
            )
            for b in range(batch)
        ]
        for number, reader in enumerate(others)
    ]


def _divergence(expected: torch.Tensor, shares: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL of log-probabilities `expected` ``[B, S, V]``, of which `shares` are the exponentials, from `found`:
    ``[B, S]``. Where `expected` is -inf nothing is added.
    """
    return torch.where(shares > 0, shares * (expected - found), 0.0).sum(-1).clamp_min(0)
