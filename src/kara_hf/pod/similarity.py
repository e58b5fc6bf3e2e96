"""`LayerSimilarity`: how alike the layers of a model attend, and the groups to share keys that follow from it."""

import json
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save_file

from ..config import is_number, require
from ..policy.sharing import PoDSharing, cannot_save, check_saving

Compare = Literal["lead", "all", "prev"]

MATRICES, SETTINGS = "similarity.safetensors", "similarity.json"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class LayerSimilarity:
    """How alike the attention of layers is: ``1 - JS``, the mean over samples, queries and the G queries of a KV head.

    JS is the Jensen-Shannon divergence (base 2) of two layers' attention to the same tokens by the same query.

    Attributes:
        similarity: ``[H, L, L]`` float32 on the CPU, in [0, 1], symmetric, with ones on the diagonal; NaN in rows and
            columns of layers that are not measured.
        kinds: for each layer what `layer_kinds` says of it; None: it has no full attention and is not measured.
        devices: for each layer where it ran; None: not measured.
        model: sizes of the model (`model_shape`).
        tokens: of each sample.
        queries: last tokens of each sample whose attention is compared.
        region: "all": their attention to every token they see; "distant": to distant ones alone, which add up to 1.
        sinks, recent: which tokens count as near, as in `PoDSharing`.
        origin: what was measured (model, data, ...); for readers.

    Raises:
        ValueError: shapes do not fit.
    """

    similarity: torch.Tensor
    kinds: tuple[str | None, ...]
    devices: tuple[str | None, ...]
    model: dict[str, Any]
    tokens: tuple[int, ...]
    queries: int
    region: Literal["all", "distant"]
    sinks: int
    recent: int
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("kinds", "devices", "tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        expected = (self.similarity.shape[0], len(self.kinds), len(self.kinds))
        if self.similarity.shape != expected or len(self.devices) != len(self.kinds):
            raise ValueError(
                f"similarity of shape {list(self.similarity.shape)} does not fit {len(self.kinds)} kinds and "
                f"{len(self.devices)} devices of layers; it must be [KV heads, layers, layers]"
            )

    @property
    def heads(self) -> int:
        return len(self.similarity)

    @property
    def layers(self) -> int:
        return len(self.kinds)

    # ------------------------------------------------------------------------------------------------- grouping layers
    def group(
        self,
        threshold: float,
        *,
        compare: Compare = "lead",
        sinks: int | None = None,
        recent: int | None = None,
        distant_query: Literal["lead", "own"] = "lead",
        prefill: Literal["dense", "pod"] = "dense",
    ) -> PoDSharing:
        """Groups the layers of each KV head from the bottom up: a layer joins the group below it, or leads a new one.

        It joins if its similarity to the group is at least `threshold`, and if it is of the same kind and on the same
        device as the layer just below. A layer without full attention stays alone.

        Args:
            threshold: in [0, 1]; the paper's is 0.5. The higher, the fewer layers share.
            compare: similarity to a group is that to its "lead", to its newest member ("prev"), or the lowest to any
                of its members ("all").
            sinks, recent: of the sharing; None: those of the exploration.
            distant_query, prefill: of the sharing.

        Raises:
            ValueError: a setting is out of range.
        """
        fits = is_number(threshold) and 0 <= threshold <= 1
        require(
            fits, "threshold", threshold, "a number in [0, 1]; where nothing is to be shared, use no sharing at all"
        )
        blocks = self._blocks(torch.tensor([threshold], dtype=torch.float64), compare)
        about = {
            **self.origin,
            "samples": len(self.tokens),
            "tokens": sum(self.tokens),
            "queries": self.queries,
            "region": self.region,
            "threshold": threshold,
            "compare": compare,
        }
        if self.region == "distant":
            about |= {"region_sinks": self.sinks, "region_recent": self.recent}
        return PoDSharing(
            lead=tuple(tuple(first[0].tolist()) for first in blocks),
            sinks=self.sinks if sinks is None else sinks,
            recent=self.recent if recent is None else recent,
            distant_query=distant_query,
            prefill=prefill,
            model=dict(self.model),
            origin=about,
        )

    def group_for(self, saving: float, tokens: int, *, compare: Compare = "lead", **settings: Any) -> PoDSharing:
        """The grouping that saves the least of all that save at least `saving` of a cache of `tokens`.

        Its threshold is in its `origin`; of several that save the same, the highest one is taken.

        Args:
            saving: share of the bytes of the full cache (`PoDSharing.saving`), in (0, 0.5).
            tokens: length of the sequence.
            compare, settings: as in `group`.

        Raises:
            ValueError: a setting is out of range, or no threshold saves so much; the message says how much is possible.
        """
        check_saving(saving, tokens)
        # With compare="lead" a higher threshold can share more, so every threshold that makes a difference is tried.
        thresholds = self.similarity.double().nan_to_num(1.0).clamp(0, 1).unique()
        blocks = enumerate(self._blocks(thresholds, compare))
        followers = torch.stack([(first != layer).sum(1) for layer, first in blocks]).sum(0)
        highest = dict(zip(followers.tolist(), thresholds.tolist(), strict=True))
        counts = sorted(highest)

        def sharing(count: int) -> PoDSharing:
            return self.group(highest[count], compare=compare, **settings)

        place = bisect_left(counts, saving, key=lambda count: sharing(count).saving(tokens))
        if place == len(counts):
            raise cannot_save(saving, tokens, sharing(counts[-1]))
        found = sharing(counts[place])
        return replace(found, origin={**found.origin, "saving": saving, "at_tokens": tokens})

    def _blocks(self, thresholds: torch.Tensor, compare: Compare) -> Iterator[torch.Tensor]:
        """For each layer, from the bottom, the lowest layer of its group: ``[T, H]`` int64 at thresholds ``[T]``."""
        require(compare in ("lead", "all", "prev"), "compare", compare, "'lead', 'all' or 'prev'")
        heads = torch.arange(self.heads)
        similarity = self.similarity.double()
        first = torch.zeros(len(thresholds), self.heads, dtype=torch.long)
        for layer in range(self.layers):
            alone = torch.full_like(first, layer)
            if self.may_join(layer):
                below = similarity[:, :layer, layer]  # to each layer below; then to the group that each of them leads
                if compare == "prev":
                    below = below[:, -1:].expand_as(below)
                elif compare == "all":
                    below = below.flip(1).cummin(1).values.flip(1)
                first = torch.where(below[heads, first] >= thresholds[:, None], first, alone)
            else:
                first = alone
            yield first

    def may_join(self, layer: int) -> bool:
        """Whether a layer can be in one group with the layer below it, whatever the threshold."""
        same = all(names[layer] == names[layer - 1] for names in (self.kinds, self.devices))
        return layer > 0 and self.kinds[layer] is not None and same

    # ------------------------------------------------------------------------------------------------- where it is kept
    def save(self, folder: str | Path) -> None:
        """Writes `similarity.safetensors` and `similarity.json` into `folder`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(self).items() if name != "similarity"}
        save_file({"similarity": self.similarity.contiguous()}, path / MATRICES)
        (path / SETTINGS).write_text(json.dumps({"format": FORMAT, **settings}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is of a newer format.
        """
        path = Path(folder)
        missing = [name for name in (MATRICES, SETTINGS) if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"there is no {missing[0]} in {path}; make one with `kara-hf pod explore`")
        settings = json.loads((path / SETTINGS).read_text())
        found = settings.pop("format", FORMAT)
        if found != FORMAT:
            raise ValueError(f"{SETTINGS} has format {found!r}, and this version of kara_hf reads {FORMAT}; update it")
        return cls(similarity=load_file(path / MATRICES)["similarity"], **settings)


def groups_of(sharing: PoDSharing, head: int) -> list[list[int]]:
    """The layers of each group of a KV head, the lead first; a layer that shares with none is a group of its own."""
    groups: dict[int, list[int]] = {}
    for layer, leads in enumerate(sharing.lead):
        groups.setdefault(leads[head], []).append(layer)
    return list(groups.values())
