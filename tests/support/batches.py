"""Token ids, and batches of rows of different lengths."""

import torch


def ids(tokens: int, seed: int = 0) -> torch.Tensor:
    """Random ids ``[N]`` of the models in miniature, none of them padding."""
    return torch.randint(1, 128, (tokens,), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ids ``[B, S]`` of rows ``[N]`` each, padded with 0 on the left, and their mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def prompt(tokens: int = 20, batch: int = 1, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
