"""The operations on paged rows: each file holds one op, its plain-torch reference and its checked entry point."""

from .append import append, append_reference, slot_index
from .attend import attend, attend_masked, attend_reference
from .compact import compact, compact_reference
from .merge import merge, merge_reference
from .rows import Near, NearKeys, Rows, gather_rows
from .shared import (
    attend_shared,
    attend_shared_reference,
    lead_scores,
    shared_attention,
    shared_attention_reference,
)
from .window_scores import window_scores, window_scores_reference

__all__ = [
    "Near",
    "NearKeys",
    "Rows",
    "append",
    "append_reference",
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
    "shared_attention",
    "shared_attention_reference",
    "slot_index",
    "window_scores",
    "window_scores_reference",
]
