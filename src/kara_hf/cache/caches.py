"""The caches by name: Kara, KV-Compress and PoD, each a `CompressedCache` under its own policy."""

from collections.abc import Iterable
from typing import Any, Literal

from ..config import KaraConfig, KVCompressConfig, as_pins
from ..policy import KaraPolicy, KVCompressPolicy
from ..policy.sharing import PoDSharing
from .compressed import CompressedCache
from .rounding import NEAREST


class KaraCache(CompressedCache):
    """Kara (arXiv 2607.01237): keeps the same share of every window of generated tokens and never returns to it.

        out = model.generate(**inputs, cache=KaraCache(model, retention=0.25))

    Args:
        model: a Transformers causal LM, which may be wrapped by PEFT. It is attached by this call.
        retention: share of each window's tokens that every KV head keeps, in (0, 1]; where `recent` is a share, of all
            tokens, recent ones among them.
        window: tokens in a window; a multiple of `block_size`. Sealed once `recent` more tokens stand behind it, and
            `min_cache_tokens` are left.
        recent: newest tokens that are always kept whole; or a share, in (0, 1), of the tokens held behind a prompt that
            is kept whole, which grows with the sequence (ours).
        min_cache_tokens: tokens that a head holds at least behind such a prompt, so that the beginning of an answer
            stays whole; None: one window where `recent` is a share, otherwise 0 (ours).
        sinks: first tokens of a sequence that are kept wherever the window that holds them seals, whatever the score:
            without them language models fall apart (arXiv 2309.17453). They are among the tokens that it keeps.
        pin: stretches ``(start, end)`` of true positions that are never evicted, in every sequence, as the sinks are;
            `cache.pin` adds to them.
        score: "blend" (ours) of the two next; "bidirectional" (the paper), which holds queries of `window` + `recent`
            tokens, or of `queries` of them; "key-difference" (KeyDiff, arXiv 2504.15364), which holds nothing; or a
            control: "causal", "random", "random-chunks" and "recency"; see `register_score`.
        queries: how many queries of a window every query head holds for a score that needs them, spread
            evenly; None: all, as published. `report().query_bytes` says what they weigh. Ours.
        anchor_share: share of the kept tokens that are picked singly before gaps between them are filled; 1 is top-k.
        compress_prompt: walk the prompt in windows too. Otherwise the prompt and every later turn (a step of several
            tokens that are not drafts of assisted decoding) is kept whole, with what is open before it.
        prefill_chunk: most tokens of a prompt or turn that are read at once. With `compress_prompt` no more than what
            was kept and one chunk is ever held.
        bits: bits of every number of keys and values of tokens that have settled, 8 or 4; None: as the model made them
            (ours; see docs/bits.md).
        key_bits, value_bits: of keys and values alone, where they differ; values may have 2.
        block_size: slots per block.
        max_bytes: cap on resident bytes; the step that would pass it raises `PoolExhausted` and is taken back.
        sharing: PoD on top: keys of distant tokens stored once for a group of layers; see `PoDCache`.
        cuda_graph: replays the decode step as a CUDA graph between compressions; see `CompressedCache`.
        seed: of the random scores.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: the model or a setting is not supported; the message names it, its value and the remedy.
    """

    def __init__(
        self,
        model: Any,
        *,
        retention: float = KaraConfig.retention,
        window: int = KaraConfig.window,
        recent: int | float = KaraConfig.recent,
        min_cache_tokens: int | None = KaraConfig.min_cache_tokens,
        sinks: int = KaraConfig.sinks,
        pin: Iterable[tuple[int, int]] = (),
        score: str = KaraConfig.score,
        queries: int | None = KaraConfig.queries,
        anchor_share: float = KaraConfig.anchor_share,
        compress_prompt: bool = KaraConfig.compress_prompt,
        prefill_chunk: int | None = None,
        bits: int | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        block_size: int = KaraConfig.block_size,
        max_bytes: int | None = None,
        sharing: PoDSharing | None = None,
        cuda_graph: bool = False,
        seed: int = KaraConfig.seed,
    ):
        config = KaraConfig(
            retention=retention,
            window=window,
            recent=recent,
            min_cache_tokens=min_cache_tokens,
            sinks=sinks,
            pin=as_pins(pin),
            score=score,
            queries=queries,
            anchor_share=anchor_share,
            compress_prompt=compress_prompt,
            prefill_chunk=prefill_chunk,
            bits=bits,
            key_bits=key_bits,
            value_bits=value_bits,
            block_size=block_size,
            seed=seed,
        )
        super().__init__(model, policy=KaraPolicy(config), sharing=sharing, max_bytes=max_bytes, cuda_graph=cuda_graph)


class KVCompressCache(CompressedCache):
    """KV-Compress (arXiv 2410.00161): a budget of tokens, spent by the votes of queries.

    With ``levels=None`` every head keeps as much as it is worth, as published. By default all heads keep as much: that
    is nearer to the full cache on the language models that were measured.

        out = model.generate(**inputs, cache=KVCompressCache(model, max_cache_tokens=512))

    A prompt is cut when decoding begins, and a turn when the answer to it begins; `compress()` does it at once.
    Exactly one of `max_cache_tokens` and `retention` is given.

    Args:
        model: a Transformers causal LM, which may be wrapped by PEFT. It is attached by this call.
        max_cache_tokens: tokens per KV head and layer that a sequence holds at most, on average, while it decodes.
        retention: share of the tokens that is kept, in (0, 1].
        min_cache_tokens: with `retention`: tokens per KV head and layer that it leaves at least, on average; None: 128
            where `protected` is a share, otherwise 0 (ours).
        observation: prompt queries that vote on what is kept, the last ones; None for all, without pooling.
        protected: newest tokens that are never evicted, or a share, in (0, 1), of what a row may hold on average behind
            its sinks (ours).
        sinks: first tokens that are never evicted.
        pin: stretches ``(start, end)`` of true positions that are never evicted, in every sequence. The budget counts
            them first; `cache.pin` adds to them.
        pool: width of the max-pool over neighbouring tokens, odd.
        metric: "l2" sums squared attention probabilities, "l1" probabilities; controls: "random", "recency".
        votes: "sum" adds votes up, as published; "mean" divides by how many queries could vote on a token (ours).
        floor: further tokens that every head keeps at least.
        accumulate: whether queries vote while decoding too.
        continual: whether eviction goes on while decoding; otherwise the cache grows behind the prompt.
        prefill_chunk: reads a prompt or turn in chunks of at most so many tokens, and cuts what was read to the budget
            before each: no more than the budget and one chunk is ever held. None: it is cut once, behind its end.
        levels: different lengths, in blocks, that rows may be cut to; 1 for uniform heads, None for any, as published.
        bits: bits of every number of keys and values of tokens that have settled, 8 or 4; None: as the model made them
            (ours; see docs/bits.md).
        key_bits, value_bits: of keys and values alone, where they differ; values may have 2.
        block_size: slots per block.
        max_bytes: cap on resident bytes: more is evicted if it takes that, as long as there is something to evict.
            A prompt that comes at once, or the first chunk of one, is held outside the cap until more comes. Turns and
            further chunks are not: before one that does not fit, what is there is cut.
        sharing: PoD on top: keys of distant tokens stored once for a group of layers; see `PoDCache`.
        cuda_graph: replays the decode step as a CUDA graph between compressions; see `CompressedCache`.
        seed: of the random metric.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: the model or a setting is not supported; the message names it, its value and the remedy.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_cache_tokens: int | None = None,
        retention: float | None = None,
        min_cache_tokens: int | None = None,
        observation: int | None = KVCompressConfig.observation,
        protected: int | float = KVCompressConfig.protected,
        sinks: int = KVCompressConfig.sinks,
        pin: Iterable[tuple[int, int]] = (),
        pool: int = KVCompressConfig.pool,
        metric: Literal["l2", "l1", "random", "recency"] = KVCompressConfig.metric,
        votes: Literal["sum", "mean"] = KVCompressConfig.votes,
        floor: int = KVCompressConfig.floor,
        accumulate: bool = KVCompressConfig.accumulate,
        continual: bool = KVCompressConfig.continual,
        prefill_chunk: int | None = None,
        levels: int | None = KVCompressConfig.levels,
        bits: int | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        block_size: int = KVCompressConfig.block_size,
        max_bytes: int | None = None,
        sharing: PoDSharing | None = None,
        cuda_graph: bool = False,
        seed: int = KVCompressConfig.seed,
    ):
        config = KVCompressConfig(
            max_cache_tokens=max_cache_tokens,
            retention=retention,
            min_cache_tokens=min_cache_tokens,
            observation=observation,
            protected=protected,
            sinks=sinks,
            pin=as_pins(pin),
            pool=pool,
            metric=metric,
            votes=votes,
            floor=floor,
            accumulate=accumulate,
            continual=continual,
            prefill_chunk=prefill_chunk,
            levels=levels,
            bits=bits,
            key_bits=key_bits,
            value_bits=value_bits,
            block_size=block_size,
            seed=seed,
        )
        super().__init__(
            model, policy=KVCompressPolicy(config), sharing=sharing, max_bytes=max_bytes, cuda_graph=cuda_graph
        )


class PoDCache(CompressedCache):
    """PoD (arXiv 2412.02252): keys of distant tokens are stored once for a group of layers. Every token is kept.

        out = model.generate(**inputs, cache=PoDCache(model, PoDSharing.from_pretrained("folder")))

    Args:
        model: a Transformers causal LM, which may be wrapped by PEFT. It is attached by this call.
        sharing: who leads whom, and what is proximal; see `kara-hf pod explore` and `kara-hf pod adapt`.
        bits: bits of every number of keys and values of tokens that have settled, 8 or 4; None: as the model made them
            (ours; see docs/bits.md).
        key_bits, value_bits: of keys and values alone, where they differ; values may have 2.
        block_size: slots per block.
        max_bytes: cap on resident bytes; the step that would pass it raises `PoolExhausted` and is taken back.
        cuda_graph: replays the decode step as a CUDA graph while there is room; see `CompressedCache`. Room is then
            made for `KaraConfig.window` tokens at a time.

    Raises:
        TypeError: `model` is no Transformers model.
        ValueError: the model or a setting is not supported, or the sharing is of another model.
    """

    def __init__(
        self,
        model: Any,
        sharing: PoDSharing,
        *,
        bits: int | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        block_size: int = KaraConfig.block_size,
        max_bytes: int | None = None,
        cuda_graph: bool = False,
    ):
        window = -(-KaraConfig.window // block_size) * block_size
        config = KaraConfig(
            retention=1.0,
            window=window,
            recent=NEAREST,
            bits=bits,
            key_bits=key_bits,
            value_bits=value_bits,
            block_size=block_size,
        )
        super().__init__(model, policy=KaraPolicy(config), sharing=sharing, max_bytes=max_bytes, cuda_graph=cuda_graph)
