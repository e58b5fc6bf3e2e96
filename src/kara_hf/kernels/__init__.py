"""The operations on paged rows: each file holds one op, its plain-torch reference and its checked entry point."""

from .append import append, append_reference, slot_index
from .attend import attend, attend_reference
from .attend_shared import attend_shared, attend_shared_reference, lead_scores
from .compact import compact, compact_reference
from .dense import attend_masked, softcapped
from .merge import merge, merge_reference
from .precision import as_sdpa
from .rows import Proximal, ProximalKeys, RoundedRows, Rows, gather_rows
from .shared_attention import shared_attention, shared_attention_reference
from .window_scores import sampled_places, window_scores, window_scores_reference

__all__ = [
    "Proximal",
    "ProximalKeys",
    "RoundedRows",
    "Rows",
    "append",
    "append_reference",
    "as_sdpa",
    "attend",
    "attend_masked",
    "attend_reference",
    "attend_shared",
    "attend_shared_reference",
    "compact",
    "compact_reference",
    "gather_rows",
    "lead_scores",
    "merge",
    "merge_reference",
    "sampled_places",
    "shared_attention",
    "shared_attention_reference",
    "slot_index",
    "softcapped",
    "window_scores",
    "window_scores_reference",
]
