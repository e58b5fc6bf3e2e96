"""`PoDSharing`: which layer's keys stand in for which other layer's, for tokens that are far away (PoD, 2412.02252)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from ..bundled import place_of
from ..config import Settings, is_int, is_number, require
from ..hub import find_file, push_file

FILE = "pod_sharing.json"
FORMAT = 1


@dataclass(frozen=True)
class PoDSharing(Settings):
    """Who leads whom, and which tokens count as near.

    Of the tokens a query sees, *proximal* are the first `sinks` of the sequence and the newest `recent`, the query's
    own among them; the others are *distant*. A (layer, KV head) pair whose lead is another layer is a *follower*: it
    stores keys of proximal tokens only, and attends to distant ones by its lead's keys, and with its lead's queries
    unless `distant_query` is "own". Values are never shared.

    Attributes:
        lead: for every layer and KV head the layer that leads it, ``[L][H]``: itself, or a lower one that leads itself.
        sinks: first tokens of a sequence that are proximal to every query.
        recent: newest tokens that are proximal, from 1 on.
        distant_query: "lead" (the paper's figure; the lead's scores are reused) or "own".
        prefill: "dense": the prompt is computed by the model's own attention, and only later queries share. "pod": the
            prompt shares too, as in training; for models that were adapted.
        skip: a follower head whose proximal tokens get at least this share of a query's attention leaves the distant
            ones out, in (0, 1]; None: it never does. Changes answers, not memory.
        model: sizes of the model that this was made for, as `model_shape` gives them; empty: of any model that fits.
        origin: how it was made; for readers.

    Raises:
        ValueError: a setting is out of range, or a lead is not one; the message names it.
    """

    lead: tuple[tuple[int, ...], ...]
    sinks: int = 16
    recent: int = 4080
    distant_query: Literal["lead", "own"] = "lead"
    prefill: Literal["dense", "pod"] = "dense"
    skip: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lead", tuple(tuple(heads) for heads in self.lead))
        widths = sorted({len(heads) for heads in self.lead})
        require(len(widths) == 1 and widths[0] > 0, "lead", self.lead, "one lead for each KV head of each layer")
        for layer, heads in enumerate(self.lead):
            for head, lead in enumerate(heads):
                if not (is_int(lead) and 0 <= lead <= layer and self.lead[lead][head] == lead):
                    raise ValueError(
                        f"lead[{layer}][{head}]={lead!r} is not possible: the lead of a layer is itself, or a lower "
                        "layer that leads itself in that head"
                    )
        for layer, heads in enumerate(self.lead):
            for head, lead in enumerate(heads):
                for between in range(lead + 1, layer):
                    if lead != layer and head in self.leading(between):
                        raise ValueError(
                            f"lead[{layer}][{head}]={lead} is not possible: layer {between}, which lies between, leads "
                            "others in that head; groups follow one another"
                        )
        require(is_int(self.sinks) and self.sinks >= 0, "sinks", self.sinks, "a whole number from 0 on")
        require(is_int(self.recent) and self.recent >= 1, "recent", self.recent, "a whole number from 1 on")
        require(self.distant_query in ("lead", "own"), "distant_query", self.distant_query, "'lead' or 'own'")
        require(self.prefill in ("dense", "pod"), "prefill", self.prefill, "'dense' or 'pod'")
        fits = self.skip is None or (is_number(self.skip) and 0 < self.skip <= 1)
        require(fits, "skip", self.skip, "None or a number in (0, 1]")

    @classmethod
    def none(cls, layers: int, heads: int, **settings: Any) -> Self:
        """Every layer leads itself: nothing is shared."""
        return cls(lead=tuple((layer,) * heads for layer in range(layers)), **settings)

    # -------------------------------------------------------------------------------------------------- what it means
    @property
    def layers(self) -> int:
        return len(self.lead)

    @property
    def heads(self) -> int:
        return len(self.lead[0])

    @property
    def proximal(self) -> int:
        """Most tokens that are proximal to a query."""
        return self.sinks + self.recent

    @property
    def followers_share(self) -> float:
        """Share of the (layer, KV head) pairs that are followers."""
        following = sum(lead != layer for layer, heads in enumerate(self.lead) for lead in heads)
        return following / (self.layers * self.heads)

    def followers(self, layer: int) -> tuple[int, ...]:
        """KV heads of a layer that follow another layer, ascending."""
        return tuple(head for head, lead in enumerate(self.lead[layer]) if lead != layer)

    def leading(self, layer: int) -> tuple[int, ...]:
        """KV heads in which some other layer follows this one, ascending."""
        above = self.lead[layer + 1 :]
        return tuple(head for head in range(self.heads) if any(heads[head] == layer for heads in above))

    def last_follower(self, layer: int) -> int:
        """The highest layer that follows `layer` in some head; `layer` itself if none does."""
        return max(above for above, heads in enumerate(self.lead) if layer in heads or above == layer)

    def saving(self, tokens: int) -> float:
        """Share of the bytes of keys and values of a full cache of `tokens` that are not stored, in [0, 0.5)."""
        return 0.5 * self.followers_share * (1 - min(tokens, self.proximal) / tokens)

    # ---------------------------------------------------------------------------------------------- whether it is right
    def check(self, shape: Mapping[str, str | int], kinds: Sequence[str]) -> None:
        """Raises ValueError if this cannot be the sharing of such a model; the message says why.

        Args:
            shape: sizes of the model, as `kara_hf.integration.shape.model_shape` gives them.
            kinds: of its layers, as `layer_kinds` beside it gives them.
        """
        wanted = self.model or {"num_hidden_layers": self.layers, "num_key_value_heads": self.heads}
        wrong = [
            f"{name} {wanted[name]} instead of {shape[name]}"
            for name in shape
            if shape[name] != wanted.get(name, shape[name])
        ]
        if (self.layers, self.heads) != (shape["num_hidden_layers"], shape["num_key_value_heads"]):
            wrong.append(f"leads of {self.layers} layers with {self.heads} KV heads")
        if wrong:
            raise ValueError(
                f"this sharing was made for another model than {shape['model_type']} with "
                f"{shape['num_hidden_layers']} layers of {shape['num_key_value_heads']} KV heads: {'; '.join(wrong)}; "
                "make one for this model with `kara-hf pod explore`"
            )
        for layer, heads in enumerate(self.lead):
            for head, lead in enumerate(heads):
                if lead != layer and not kinds[layer].startswith("full_attention"):
                    raise ValueError(
                        f"lead[{layer}][{head}]={lead} is not possible: layer {layer} is {kinds[layer]}, and only "
                        "layers of full attention share keys"
                    )
                if kinds[layer] != kinds[lead]:
                    raise ValueError(
                        f"lead[{layer}][{head}]={lead} is not possible: layer {layer} is {kinds[layer]} and layer "
                        f"{lead} is {kinds[lead]}; only layers of one kind can share keys"
                    )

    # ------------------------------------------------------------------------------------------------- where it is kept
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `pod_sharing.json` into `folder`, beside an adapter or a model."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE).write_text(self.to_json() + "\n")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> Self:
        """Reads what `save_pretrained` wrote: from a folder, from the file itself, or from a model hub; or what comes
        with this package, by its name.

        Args:
            hub: `revision`, `token` and whatever else `huggingface_hub.hf_hub_download` takes.

        Raises:
            FileNotFoundError: a folder without the file.
            OSError: no such repository can be reached.
            ValueError: the file is of a newer format, or what it says is not possible.
        """
        remedy = "make one with `kara-hf pod explore` or `kara-hf pod adapt`"
        path = find_file(place_of(str(name_or_path)), FILE, "sharing", remedy, **hub)
        return cls.from_json(path.read_text())

    def push_to_hub(self, repo_id: str, **hub: Any) -> None:
        """Uploads `pod_sharing.json` to a model repository, which is created if it is not there.

        Args:
            hub: `token`, `private` (of a new repository), `revision` and `commit_message`.
        """
        push_file(self.to_json().encode(), FILE, repo_id, **hub)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **json.loads(super().to_json())}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises TypeError on an unknown setting, ValueError on one out of range or a file of a newer format."""
        data: dict[str, Any] = json.loads(text)
        found = data.pop("format", FORMAT)
        if found != FORMAT:
            raise ValueError(
                f"this sharing has format {found!r}, and this version of kara_hf reads {FORMAT}; update it"
            )
        return cls(**data)


def check_saving(saving: float, tokens: int) -> None:
    """Raises ValueError if one of them is out of range."""
    fits = is_number(saving) and 0 < saving < 0.5
    require(fits, "saving", saving, "a number between 0 and 0.5, since values are never shared")
    require(is_int(tokens) and tokens >= 1, "tokens", tokens, "a whole number from 1 on")


def cannot_save(saving: float, tokens: int, most: PoDSharing) -> ValueError:
    """An error that says how much can be saved, by the sharing that saves `most`."""
    leads = round(most.layers * most.heads * (1 - most.followers_share))
    return ValueError(
        f"saving={saving} is not possible at {tokens:,} tokens, where at most "
        f"{math.floor(1e4 * most.saving(tokens)) / 1e4} can be saved: values are never shared, the {most.proximal:,} "
        f"proximal tokens (sinks + recent) keep their keys, and {leads} of the {most.layers * most.heads} pairs of "
        "layer and KV head have to lead; lower saving or recent, or ask for more tokens"
    )
