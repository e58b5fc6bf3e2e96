"""`search`: which layers can share keys with the least effect on what the model predicts (PoD, 2412.02252).

    path = search(model, samples, saving=0.25, tokens=2048, sinks=16, recent=112)
    sharing = path.group_for(0.2, 2048)           # any smaller saving, without the model

Where `explore` asks how alike layers attend, this asks what sharing does: layers join the group below them one after
the other, the least harmful first.
"""

import heapq
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

import torch
import transformers

from ..cache.bound_model import BoundModel
from ..config import require
from ..integration.attach import decoder_config, unwrap
from ..integration.shape import layer_kinds, model_name, model_shape
from ..policy.sharing import PoDSharing, cannot_save, check_saving
from .explore import check_ids
from .forward import SharedForward
from .loss import divergence

FILE = "pod_effect.json"
FORMAT = 1

Unit = tuple[int, tuple[int, ...]]  # a layer, and the KV heads in which it joins the group below it


@dataclass(frozen=True)
class Join:
    """A layer joins the group of the layer below it.

    Attributes:
        layer: which.
        heads: KV heads in which it does.
        divergence: KL(unshared || shared) of a token that has distant ones, in nats, with this join and all before it.
    """

    layer: int
    heads: tuple[int, ...]
    divergence: float


@dataclass(frozen=True)
class SharingPath:
    """From no sharing to the most that was searched for, one join after the other.

    Attributes:
        joins: in their order.
        nothing: the sharing before the first join, in which every layer leads itself.
        tokens: of each sample that was measured on.
    """

    joins: tuple[Join, ...]
    nothing: PoDSharing
    tokens: tuple[int, ...] = field(default=())

    def sharing(self, count: int) -> PoDSharing:
        """After the first `count` joins; the last one's divergence is in its `origin`."""
        taken = self.joins[:count]
        divergence = taken[-1].divergence if taken else 0.0
        about = {**self.nothing.origin, "samples": len(self.tokens), "divergence": divergence}
        return replace(joined(self.nothing, [(join.layer, join.heads) for join in taken]), origin=about)

    def group_for(self, saving: float, tokens: int) -> PoDSharing:
        """Of the sharings on the path that save at least `saving` of a full cache of `tokens`, that of least effect:
        two groups that have become one may do less harm than before.

        Raises:
            ValueError: no sharing on the path does.
        """
        check_saving(saving, tokens)
        sharings = [self.sharing(count) for count in range(len(self.joins) + 1)]
        enough = [sharing for sharing in sharings if sharing.saving(tokens) >= saving]
        if not enough:
            raise cannot_save(saving, tokens, sharings[-1])
        found = min(enough, key=lambda sharing: sharing.origin["divergence"])
        return replace(found, origin={**found.origin, "saving": saving, "at_tokens": tokens})

    def save(self, folder: str | Path) -> None:
        """Writes `pod_effect.json` into `folder`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is of a newer format.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"there is no {FILE} in {folder}; make one with `kara-hf pod effect`")
        data = json.loads(path.read_text())
        found = data.pop("format", FORMAT)
        if found != FORMAT:
            raise ValueError(f"{FILE} has format {found!r}, and this version of kara_hf reads {FORMAT}; update it")
        joins = tuple(Join(each["layer"], tuple(each["heads"]), each["divergence"]) for each in data["joins"])
        return cls(joins, PoDSharing(**data["nothing"]), tuple(data["tokens"]))


def search(
    model: torch.nn.Module,
    samples: Iterable[torch.Tensor],
    *,
    saving: float,
    tokens: int,
    per: Literal["head", "layer"] = "head",
    sinks: int = 16,
    recent: int = 4080,
    distant_query: Literal["lead", "own"] = "lead",
    progress: Callable[[float, float], object] | None = None,
) -> SharingPath:
    """Joins layers until `saving` is reached, always by the join that adds least divergence.

    Every join is measured alone first. Later the one that seemed best is measured again beside those already made; it
    is made if it still is the best (lazy greedy search). So a join that became better only through others is found
    late. L layers of H heads take about 2 to 4 L H runs of the model over all samples, or L of them per layer.

    In memory lie the logits of all tokens that have distant ones, in the model's dtype. The model is left as it was.

    Args:
        model: a Transformers causal LM, or one wrapped by PEFT.
        samples: token ids ``[N]`` int64 each, longer than `sinks` + `recent`.
        saving: share of the bytes of a full cache of `tokens`, in (0, 0.5).
        tokens: see `saving`.
        per: whether a layer joins in each KV head by itself, or in all at once.
        sinks, recent, distant_query: of the sharing.
        progress: called after each run over all samples with the saving so far, and its divergence.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: a setting is out of range, a sample is too short, there is none, or so much cannot be saved.
    """
    check_saving(saving, tokens)
    require(per in ("head", "layer"), "per", per, "'head' or 'layer'")
    inner = unwrap(model)
    config, binding = decoder_config(inner), BoundModel(inner)
    kinds, shape = layer_kinds(config), model_shape(config)
    heads = int(shape["num_key_value_heads"])
    nothing = PoDSharing.none(
        len(kinds),
        heads,
        sinks=sinks,
        recent=recent,
        distant_query=distant_query,
        model=dict(shape),
        origin={
            "model_name": model_name(inner) or binding.name,
            "dtype": str(inner.dtype).removeprefix("torch."),
            "transformers": transformers.__version__,
            "chosen_by": f"effect per {per}",
        },
    )
    full, devices = set(binding.observable_layers()), binding.devices
    places = [(kind, devices.get(layer)) if layer in full else None for layer, kind in enumerate(kinds)]
    able = [layer for layer in range(1, len(kinds)) if places[layer] is not None and places[layer] == places[layer - 1]]
    together = [tuple(range(heads))] if per == "layer" else [(head,) for head in range(heads)]
    units = [(layer, some) for layer in able for some in together]
    most = joined(nothing, units)
    if most.saving(tokens) < saving:
        raise cannot_save(saving, tokens, most)
    effect = Effect(model, samples, nothing)
    joins: list[Join] = []
    shared, divergence = nothing, 0.0  # with all joins so far

    def measured(unit: Unit) -> float:
        found = effect(joined(shared, [unit]))
        if progress is not None:
            progress(shared.saving(tokens), divergence)
        return found

    alone = [measured(unit) for unit in units]
    # What a unit adds, how many joins there were when that was measured, and the divergence with it.
    queue = [(found, 0, unit, found) for unit, found in zip(units, alone, strict=True)]
    heapq.heapify(queue)
    while shared.saving(tokens) < saving:
        _, before, unit, found = heapq.heappop(queue)
        if before == len(joins):
            joins.append(Join(*unit, found))
            shared, divergence = joined(shared, [unit]), found
        else:
            found = measured(unit)
            heapq.heappush(queue, (found - divergence, len(joins), unit, found))
    return SharingPath(tuple(joins), nothing, effect.tokens)


class Effect:
    """What sharing does to predictions: KL(unshared || shared), the mean over all tokens that have distant ones.

    Args:
        model: a Transformers causal LM, or one wrapped by PEFT.
        samples: as of `search`.
        nothing: says which tokens are near.

    Attributes:
        tokens: of each sample.
    """

    def __init__(self, model: torch.nn.Module, samples: Iterable[torch.Tensor], nothing: PoDSharing):
        self.model, self.near = model, nothing.proximal
        self.samples = list(samples)
        if not self.samples:
            raise ValueError("there is no sample to measure on; give one at least")
        for number, ids in enumerate(self.samples):
            why = f"sinks={nothing.sinks}, recent={nothing.recent} and one more, which has distant tokens"
            check_ids(ids, number, self.near + 1, why)
        self.tokens = tuple(len(ids) for ids in self.samples)
        self.expected = [self._logits(ids) for ids in self.samples]
        if not all(logits.isfinite().all() for logits in self.expected):
            raise ValueError("the model's logits are not finite; load it in another dtype (bfloat16 or float32)")

    @torch.no_grad()
    def __call__(self, sharing: PoDSharing) -> float:
        """Nats per token."""
        total = 0.0
        with SharedForward(self.model, sharing):
            for ids, expected in zip(self.samples, self.expected, strict=True):
                total += float(divergence(self._logits(ids), expected))
        mean = total / sum(length - self.near for length in self.tokens)
        if not math.isfinite(mean):
            raise ValueError(f"the divergence is {mean}; load the model in another dtype (bfloat16 or float32)")
        return mean

    @torch.no_grad()
    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the tokens that have distant ones, ``[1, S, V]``."""
        was_training = self.model.training
        self.model.eval()
        try:
            logits = self.model(input_ids=ids[None].to(unwrap(self.model).device), use_cache=False).logits
        finally:
            self.model.train(was_training)
        return logits[:, self.near :].clone()


def joined(sharing: PoDSharing, units: Sequence[Unit]) -> PoDSharing:
    """`sharing`, with each of the `units` in the group of the layer below it too."""
    joining = {(layer, head) for layer, heads in units for head in heads}
    lead: list[tuple[int, ...]] = []
    for layer, leads in enumerate(sharing.lead):
        joins = [first != layer or (layer, head) in joining for head, first in enumerate(leads)]
        lead.append(tuple(lead[layer - 1][head] if joins[head] else layer for head in range(sharing.heads)))
    return replace(sharing, lead=tuple(lead))
