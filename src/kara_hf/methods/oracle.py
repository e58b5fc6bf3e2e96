"""The upper bound of any score with Kara's budget shape: it has read the future of the full-cache run."""

from itertools import accumulate
from typing import Any

import torch

from ..cache.bound_model import BoundModel
from ..cache.compressed import CompressedCache
from ..cache.compression import register_compression
from ..cache.window_compression import WindowCompression
from ..config import KaraConfig
from ..integration.attach import hooked, unwrap
from ..integration.attention import AttentionFunction, AttentionHook
from ..kernels import softcapped
from ..policy import KaraPolicy, Window

QUERY_CHUNK = 256  # queries whose attention to everything lies in memory at once, of one sequence

Future = dict[int, torch.Tensor]


@torch.inference_mode()
def future_attention(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, prompts: list[int], contexts: list[int], config: KaraConfig
) -> Future:
    """How much attention every token will get at most, from any query that comes after its window was sealed.

        f[j] = max over query heads of the group and queries i behind the seal of softmax_j(q_i . k_j * scaling)

    the softmax over all that i sees in the full cache. The seal of a window is where `KaraCache` makes it: where the
    recent tokens behind it are there, and not within a forward over several tokens.

    Args:
        model: a Transformers causal LM.
        ids: of prompts and what the full cache made of them, left-padded ``[B, T]``.
        mask: ``[B, T]``, 0 for padding.
        prompts: tokens of each prompt, which are read at once.
        contexts: tokens of each prompt that are read before a question, also at once; 0 where there is no such part.
        config: window, recent and whether prompts are compressed.

    Returns:
        For each layer of full attention ``[B, H, T]`` float32 by true position; 0 behind a sequence's end.
    """
    inner, policy = unwrap(model), KaraPolicy(config)
    full = set(BoundModel(inner).full_layers())
    future: Future = {}
    real = mask.bool()

    class Reader(AttentionHook):
        def attend(
            self,
            own: AttentionFunction,
            module: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            if module.layer_idx in full:
                scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
                rows = [
                    _received(query[b][:, real[b]], key[b][:, real[b]], seals(b), scaling, kwargs.get("softcap"))
                    for b in range(len(query))
                ]
                future[module.layer_idx] = torch.nn.utils.rnn.pad_sequence(
                    [row.T for row in rows], batch_first=True
                ).transpose(1, 2)
            return own(module, query, key, value, attention_mask, **kwargs)

    def seals(b: int) -> torch.Tensor:
        """First query behind the seal of each token's window, ``[T]``."""
        first = 0 if config.compress_prompt else prompts[b]
        window = (torch.arange(int(real[b].sum()), device=ids.device) - first) // config.window
        count = max(0, int(window[-1]) + 1)
        kept = accumulate(policy.kept_of(first + number * config.window, config.pin) for number in range(count))
        recent = torch.tensor([policy.recent_of(slots) for slots in kept] or [0], device=ids.device)
        seal = first + (window + 1) * config.window + recent[window.clamp(min=0)]
        if config.compress_prompt:
            for start, stop in ((0, contexts[b]), (contexts[b], prompts[b])):
                seal = torch.where((seal > start) & (seal <= stop), stop, seal)
        return seal

    with hooked(inner, Reader()):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inner(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    return future


def _received(
    query: torch.Tensor, key: torch.Tensor, seal: torch.Tensor, scaling: float, softcap: float | None
) -> torch.Tensor:
    """Most attention that keys ``[H, T, D]`` of one sequence get from queries ``[Hq, T, D]`` from `seal` ``[T]`` on:
    ``[H, T]`` float32.
    """
    heads, tokens, _ = key.shape
    grouped = query.float().unflatten(0, (heads, -1))
    place = torch.arange(tokens, device=key.device)
    most = torch.zeros(heads, tokens, device=key.device)
    for part in place.split(QUERY_CHUNK):
        logits = grouped[:, :, part] @ key.float()[:, None].transpose(-1, -2) * scaling
        shares = softcapped(logits, softcap).masked_fill(place > part[:, None], float("-inf")).softmax(-1)
        most = torch.maximum(most, shares.masked_fill(part[:, None] < seal, 0.0).amax((1, 2)))
    return most


class OraclePolicy(KaraPolicy):
    """Keeps of every window what has to stay and what will be attended to most; of an empty future the first tokens."""

    def __init__(self, config: KaraConfig, future: Future):
        super().__init__(config)
        self.future = future

    def select(self, window: Window) -> torch.Tensor:
        width = window.keys.shape[2]
        if not self.future:
            shape = (len(window.starts), window.rows, width)
            return self.pick(window, torch.zeros(shape, device=window.keys.device), chunks=False)
        layer = torch.nn.functional.pad(self.future[window.layer], (0, max(window.starts) + width))
        parts = [layer[b, :, start : start + width] for b, start in zip(window.sequences, window.starts, strict=True)]
        return self.pick(window, torch.stack(parts), chunks=False)


register_compression(OraclePolicy, WindowCompression)


class OracleCache(CompressedCache):
    """As `kara_hf.KaraCache`, with a score that no method can have.

    Args:
        model: a Transformers causal LM.
        future: from `future_attention`, of the same batch.
        settings: of `kara_hf.KaraConfig`; the score is ignored.
    """

    def __init__(self, model: Any, future: Future, *, max_bytes: int | None = None, **settings: Any):
        config = KaraConfig(**settings | {"score": "random"})
        super().__init__(model, policy=OraclePolicy(config, future), max_bytes=max_bytes)
