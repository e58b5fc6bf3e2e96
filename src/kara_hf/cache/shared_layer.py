"""A compressed layer whose heads share keys with other layers (PoD, arXiv 2412.02252)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..kernels import Proximal, attend_shared, lead_scores, shared_attention
from ..policy.sharing import PoDSharing
from ..storage import Prompt, Stored
from .layer import CompressedLayer
from .step import Step

FIRST_DRAFTS = 64  # tokens behind a prompt that may be drafts, and must be croppable where layers share keys


class SharedLayer(CompressedLayer):
    """A `CompressedLayer` in which some KV heads follow another layer, or are followed by one."""

    def __init__(self, index: int, model: str, state: Any, sharing: PoDSharing):
        super().__init__(index, model, state)
        self.sharing = sharing
        self.followers = tuple(sharing.followers(index))
        self.leading = tuple(sharing.leading(index))
        self.deciding = tuple(head for head in range(sharing.heads) if head not in self.followers)

    # --------------------------------------------------------------------------------------------------- one attention
    def is_dense(self, step: Step) -> bool:
        return step.first and not (self.followers and self.sharing.prefill == "pod")

    def attend(
        self, step: Step, own: Any, module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self.latent and (self.followers or self.leading):
            raise ValueError(
                f"layer {self.index} of {self.model} keeps one latent row for all its heads (multi-head latent "
                "attention), whose keys cannot be shared by head"
            )
        if self.is_dense(step):
            self._hand_on(step, query, None, key)
        return super().attend(step, own, module, query, key, *args, **kwargs)

    def attend_stored(self, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not (self.followers or self.leading):
            return super().attend_stored(step, query, key, value)
        if step.visibility is not None and not step.visibility.uniform:
            raise ValueError(
                f"the attention mask of {self.model} is not that of causal sequences, which shared keys do not "
                "support; use a mask of 0 and 1 for each token, or a cache without sharing"
            )
        if step.new == 1 and not step.first and step.visibility is None:
            return self._attend_one(step, query, key, value)
        return self._attend_several(step, query, key, value)

    def _attend_one(self, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """A decode step: the scores of distant tokens are handed up from leads to followers."""
        sharing, own = self.sharing, self.sharing.distant_query == "own"
        if own and not self.followers:
            return super().attend_stored(step, query, key, value)
        self.append(step)
        scores = step.scores.get(query.device)
        if own:
            assert step.rows_of is not None
            leads = [step.rows_of(sharing.lead[self.index][head]) for head in self.followers]
            scores = lead_scores(query, leads, self.followers, scaling=self.scaling, softcap=self.softcap)
        out, step.scores[query.device] = attend_shared(
            query,
            self.paged().rows(),
            scores,
            positions=self._positions(step, query.device),
            leading=() if own else self.leading,
            skip=sharing.skip,
            metric_power=step.metric_power,
            **self.settings,
        )
        return out

    def _attend_several(self, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Several queries have several sets of proximal tokens, and the oldest keys go when the new ones come: so
        attention is over what was stored and the new tokens behind it.

        So it is for one query that may not see all of what was stored, whose position is then -1.
        """
        positions = self._positions(step, query.device)
        keys, values, places, past = key, value, positions[:, None], None
        if self.store is not None:
            rows = self.paged().rows()
            past = rows.all_keys()
            keys, values = torch.cat([past, key], 2), torch.cat([rows.all_values(), value], 2)
            before = rows.all_positions()
            if step.visibility is not None:
                before = before.masked_fill(step.visibility.hidden(before), -1)
            places = torch.cat([before, places.expand(-1, before.shape[1], -1)], 2)
        self._hand_on(step, query, past, key)
        if not self.followers:
            return super().attend_stored(step, query, key, value)
        out = shared_attention(
            query,
            keys,
            values,
            *self._of_leads(step, query, keys.shape[2] - step.new),
            followers=self.followers,
            query_positions=positions,
            key_positions=places,
            proximal=Proximal(self.sharing.sinks, self.sharing.recent),
            skip=self.sharing.skip,
            **self.settings,
        )
        for lead in set(self.sharing.lead[self.index]):
            if self.sharing.last_follower(lead) == self.index:
                step.leads.pop(lead, None)
        self.append(step)
        return out

    def _positions(self, step: Step, device: torch.device) -> torch.Tensor:
        """True positions of the new columns, ``[B, S]`` int32, -1 for padding."""
        positions = step.positions.to(device)
        return positions if step.real is None else positions.masked_fill(~step.real.to(device), -1)

    def _of_leads(self, step: Step, query: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What followers use for distant tokens: queries ``[B, F * G, S, D]`` and keys ``[B, F, past + S, D]``."""
        group = query.shape[1] // self.sharing.heads
        queries, keys = [], []
        for head in self.followers:
            lead_query, stored, new = step.leads[self.sharing.lead[self.index][head]]
            source = lead_query if self.sharing.distant_query == "lead" else query
            queries.append(source[:, head * group : (head + 1) * group])
            shared = new[:, head : head + 1]
            if stored is not None:  # another head of the lead may hold more or less than any of this layer
                stored = stored[:, head : head + 1, :past]
                shared = torch.cat([F.pad(stored, (0, 0, 0, past - stored.shape[2])), shared], 2)
            keys.append(shared)
        return torch.cat(queries, 1), torch.cat(keys, 1)

    def _hand_on(self, step: Step, query: torch.Tensor, past: torch.Tensor | None, key: torch.Tensor) -> None:
        """Leaves queries and keys of several tokens for the layers that follow this one, where they will be asked."""
        if self.leading and not (step.first and self.sharing.prefill == "dense"):
            step.leads[self.index] = query, past, key

    # ----------------------------------------------------------------------------------------------------- its storage
    def make_store(self, step: Step, keys: torch.Tensor, values: torch.Tensor) -> Stored | Prompt:
        store = super().make_store(step, keys, values)
        if step.recording and not isinstance(store, Prompt):
            store.widen(FIRST_DRAFTS)
        return store

    def proximal(self, heads: int) -> dict[str, Any]:
        if heads != self.sharing.heads:
            raise ValueError(
                f"layer {self.index} of {self.model} stores {heads} KV heads and the sharing is for "
                f"{self.sharing.heads}; make one for this model with `kara-hf pod explore`"
            )
        return {"followers": self.followers, "proximal": Proximal(self.sharing.sinks, self.sharing.recent)}

    def proximal_places(self, tokens: int, block_size: int) -> int:
        return min(self.sharing.proximal, -(-tokens // block_size) * block_size)

    def prepare_to_take_back(self, tokens: int) -> None:
        if not isinstance(self.store, Prompt | None):
            self.store.widen(tokens)

    def can_crop(self, tokens: np.ndarray) -> bool:
        """Whether the keys of followers reach back behind the newest `tokens` ``[B]``."""
        near = None if isinstance(self.store, Prompt | None) else self.store.proximal
        return near is None or bool(near.can_crop(tokens).all())
