"""Samples that a model is trained on or measured with, and the order in which they are taken.

A sample is a sequence of token ids ``[S]`` int64, or a pair of it and labels ``[S]``: as in Transformers, the label of
a token is that token, or -100 where it is not to be learned.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..probing.data import token_samples
from .config import AdaptConfig

Sample = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Start = Callable[[int], Iterator[Sample]]  # gives the samples from the n-th on

IGNORED = -100


def ids_of(sample: Sample) -> torch.Tensor:
    return sample if isinstance(sample, torch.Tensor) else sample[0]


def collate(samples: Sequence[Sample], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets of samples, ``[B, S]`` int64 each, S being the longest.

    The target of a token is the one that follows, or `IGNORED`. Shorter samples are padded on the right, where a causal
    model needs no mask: only padding sees padding.

    Raises:
        ValueError: a sample is not a sequence of ids, or its labels are not as long.
    """
    for sample in samples:
        ids, labels = (sample, sample) if isinstance(sample, torch.Tensor) else sample
        if ids.ndim != 1 or ids.shape != labels.shape or ids.is_floating_point():
            raise ValueError(
                f"a sample of shape {tuple(ids.shape)} and {ids.dtype} with labels of shape {tuple(labels.shape)} is "
                "not possible: give token ids [S] int64, or a pair of them and of labels of the same length"
            )
    width = max(len(ids_of(sample)) for sample in samples)
    rows = torch.zeros(len(samples), width, dtype=torch.int64)
    targets = torch.full_like(rows, IGNORED)
    for row, sample in enumerate(samples):
        ids, labels = (sample, sample) if isinstance(sample, torch.Tensor) else sample
        rows[row, : len(ids)] = ids
        targets[row, : len(ids) - 1] = labels[1:]
    return rows.to(device), targets.to(device)


def without_targets(sample: Sample) -> Sample:
    """The same ids, of which nothing is learned or measured."""
    ids = ids_of(sample)
    return ids, torch.full_like(ids, IGNORED)


class SampleStream:
    """Samples in order, and from the first again when they end.

    Args:
        start: gives the samples from the n-th on.
        first: samples at the beginning that are never given.

    Attributes:
        position: samples given since the first; set it before anything is taken to go on from there.
    """

    def __init__(self, start: Start, first: int):
        self.start, self.first, self.position = start, first, 0
        self._samples: Iterator[Sample] | None = None

    def take(self, count: int) -> list[Sample]:
        """Raises ValueError if there are no samples."""
        taken: list[Sample] = []
        while len(taken) < count:
            if self._samples is None:
                self._samples = self.start(self.first + self.position)
            more = list(islice(self._samples, count - len(taken)))
            taken += more
            self.position += len(more)
            if len(taken) < count:
                if not self.position:
                    raise ValueError(
                        f"the data has no samples to train on behind the first {self.first}, which are held out; give "
                        "more data or lower held_out"
                    )
                self.position, self._samples = 0, None
        return taken


def opener(
    data: str | Sequence[Sample] | Start, tokenizer: PreTrainedTokenizerBase | None, config: AdaptConfig
) -> Start:
    """How to read data from the n-th sample on.

    Raises:
        ValueError: data is given by name, and the tokenizer is missing or does not know `config.learn_after`.
    """
    if callable(data):
        return data
    if not isinstance(data, str):
        return lambda skip: (data[index] for index in range(skip, len(data)))
    if tokenizer is None:
        raise ValueError(f"data={data!r} is text, for which the tokenizer of the model is needed; pass tokenizer")
    settings: dict[str, Any] = {
        "length": config.length,
        "split": config.split,
        "text_column": config.text_column,
        "seed": config.seed,
    }
    if config.learn_after is None:
        return lambda skip: token_samples(data, tokenizer, skip=skip, **settings)
    begin = tokenizer.get_vocab().get(config.learn_after)
    if begin is None:
        raise ValueError(
            f"learn_after={config.learn_after!r} is not possible: the tokenizer has no such token; give one of its "
            "vocabulary"
        )
    end, only_first = tokenizer.eos_token_id, config.learn_first
    return lambda skip: learned_after(
        token_samples(data, tokenizer, skip=skip, **settings), begin, end, only_first=only_first
    )


def learned_after(
    samples: Iterable[torch.Tensor], begin: int, end: int, *, only_first: bool = False
) -> Iterator[Sample]:
    """Samples of which only what follows a token `begin` is learned, up to and with the next token `end`."""
    for ids in samples:
        labels = torch.full_like(ids, IGNORED)
        ends = (ids == end).nonzero().flatten()
        begins = (ids == begin).nonzero().flatten().tolist()
        for first in begins[:1] if only_first else begins:
            behind = ends[ends > first]
            last = int(behind[0]) if len(behind) else len(ids) - 1
            labels[first + 1 : last + 1] = ids[first + 1 : last + 1]
        yield ids, labels
