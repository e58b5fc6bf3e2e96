"""How work on long rows is split among programs."""

WAVES = 2  # programs per processor that split-K aims for
MAX_SPLITS = 64
WIDTH_STEP = 16  # the width of observed logits is a multiple of it, for aligned access


def plan_splits(programs: int, length: int, tile: int, splits: int | None, target: int) -> tuple[int, int]:
    """Into how many ranges of how many tokens rows of `length` are split, so that about `target` programs run."""
    tiles = -(-length // tile)
    wanted = splits or min(max(1, target // programs), MAX_SPLITS)
    span = -(-tiles // min(wanted, tiles)) * tile
    return -(-length // span), span
