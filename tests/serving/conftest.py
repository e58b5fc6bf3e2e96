"""Engines that are kept, and audited at every step."""

from collections.abc import Iterator

import pytest
import torch
from support.serving import audit

from kara_hf.serving.engine import Engine


@pytest.fixture
def engines(monkeypatch) -> list[Engine]:
    """Every engine made from here on, with what it belongs to kept alive."""
    made, begin = [], Engine.__init__

    def keep(engine, processor, *args):
        begin(engine, processor, *args)
        engine.kept = processor
        made.append(engine)

    monkeypatch.setattr(Engine, "__init__", keep)
    return made


@pytest.fixture
def audited(engines, monkeypatch) -> Iterator[list[Engine]]:
    """The same; checks at every step of each that every block is somewhere, once, and so is every query."""
    prepare, steps = Engine._prepare, []

    def checked(engine, *args, **kwargs):
        prepare(engine, *args, **kwargs)
        steps.append(engine)
        audit(engine)

    monkeypatch.setattr(Engine, "_prepare", checked)
    yield engines
    assert steps, "no step was taken"


class _Unpinned:
    """Torch for a machine whose host memory cannot be pinned."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *args, pin_memory=False, **kwargs):
        return torch.empty(*args, **kwargs)


@pytest.fixture
def unpinned(monkeypatch) -> None:
    """The engine's swap space can be had on any machine."""
    from transformers.generation.continuous_batching import offloading_manager

    monkeypatch.setattr(offloading_manager, "torch", _Unpinned())
