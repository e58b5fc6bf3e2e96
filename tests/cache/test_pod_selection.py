"""PoD with token selection in one cache: one choice for a group, exact without what was evicted, bytes multiply."""

import dataclasses

import pytest
import torch
from support.batches import left_padded, prompt
from support.caches import live_tensors
from support.marks import slow
from support.oracle import EVICTED, check
from support.sharing import HEADS, LAYERS, LONG, SHARED, close, deep
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from kara_hf import KaraCache, KVCompressCache, PoDSharing

KARA = {"window": 16, "recent": 4, "block_size": 4, "retention": 0.5}
KV = {"block_size": 4, "protected": 6, "sinks": 2, "observation": 8, "pool": 3, "max_cache_tokens": 20}
KV |= {"votes": "sum", "levels": None}
WIDE = PoDSharing(lead=((0, 0),) * LAYERS, sinks=1, recent=12)

SHARING: dict[str, PoDSharing] = {}
PADDING: list[int] = []
LEADS: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def shared_attention(module, query, key, value, attention_mask, **kwargs):
    """Dense attention with keys of leads at distant positions, and -inf at evicted tokens; plain in a dense prefill."""
    sharing, layer = SHARING["now"], module.layer_idx
    LEADS[layer] = query, key
    batch, heads, columns, size = key.shape
    group, new = query.shape[1] // heads, query.shape[2]

    def products(query, key):
        return query.unflatten(1, (heads, group)) @ key[:, :, None].transpose(-1, -2) * size**-0.5

    logits = products(query, key)
    if sharing.prefill == "pod" or columns > new:
        place = torch.arange(columns) - torch.tensor(PADDING)[:, None]
        at = place[:, columns - new :, None]
        distant = (place[:, None] >= sharing.sinks) & (place[:, None] <= at - sharing.recent)
        for head in sharing.followers(layer):
            lead_query, lead_key = LEADS[sharing.lead[layer][head]]
            asked = query if sharing.distant_query == "own" else lead_query
            far = products(asked, lead_key)[:, head]
            logits[:, head] = torch.where(distant[:, None], far, logits[:, head])
    evicted = EVICTED.get(layer)
    if evicted is not None:
        gone = torch.zeros(batch, heads, columns, dtype=torch.bool)
        gone[..., : evicted.shape[2]] = evicted
        logits = logits.masked_fill(gone[:, :, None, None], float("-inf"))
    logits = logits + attention_mask[:, :, None, -new:, :columns]
    out = logits.softmax(-1) @ value[:, :, None]
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("oracle-pod", shared_attention)
AttentionMaskInterface.register("oracle-pod", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@pytest.fixture(scope="module")
def model():
    return deep()


def checked(model, sharing, padding, make, steps, **settings) -> int:
    SHARING["now"], PADDING[:] = sharing, padding
    try:
        return check(model, padding, make, steps, attention="oracle-pod", **settings)
    finally:
        LEADS.clear()


@pytest.mark.parametrize("distant_query", ["lead", "own"])
@pytest.mark.parametrize("prefill", ["dense", "pod"])
@pytest.mark.parametrize("sharing", [SHARED, WIDE], ids=["mixed", "wide"])
@pytest.mark.parametrize("compress_prompt", [True, False])
@pytest.mark.parametrize("padding", [[0, 0], [5, 0]], ids=str)
def test_kara_equals_dense_attention_without_the_evicted(
    model, sharing, padding, compress_prompt, prefill, distant_query
):
    sharing = dataclasses.replace(sharing, prefill=prefill, distant_query=distant_query)

    def make(model):
        return KaraCache(model, sharing=sharing, compress_prompt=compress_prompt, **KARA)

    steps = [40] + [1] * 21 + [9] + [1] * 4 if not any(padding) else [40] + [1] * 24
    assert checked(model, sharing, padding, make, steps) > 0


@pytest.mark.parametrize("distant_query", ["lead", "own"])
@pytest.mark.parametrize("sharing", [SHARED, WIDE], ids=["mixed", "wide"])
@pytest.mark.parametrize("padding", [[0, 0], [5, 0]], ids=str)
@pytest.mark.parametrize("settings", [{}, {"max_cache_tokens": None, "retention": 0.5}, {"metric": "random"}], ids=str)
def test_kv_compress_equals_dense_attention_without_the_evicted(model, sharing, padding, settings, distant_query):
    sharing = dataclasses.replace(sharing, distant_query=distant_query)

    def make(model):
        return KVCompressCache(model, sharing=sharing, **KV | settings)

    assert checked(model, sharing, padding, make, [40] + [1] * 18, first=True) > 0


@pytest.mark.parametrize("score", ["bidirectional", "random-chunks", slow("recency")])
def test_a_group_keeps_what_its_lead_chose(model, score):
    cache = KaraCache(model, sharing=SHARED, score=score, compress_prompt=True, **KARA)
    rows = [prompt(n, seed=n)["input_ids"][0] for n in (60, 25)]
    model.generate(**left_padded(rows), past_key_values=cache, **LONG)
    same_group(cache, SHARED, 2)
    kept = {tuple(cache.kept_positions(layer, 0, 0).tolist()) for layer in (0, 3, 5)}
    assert score == "recency" or len(kept) == 3  # leads choose for themselves


def same_group(cache, sharing, batch):
    for layer, heads in enumerate(sharing.lead):
        for head, lead in enumerate(heads):
            for b in range(batch):
                ours, theirs = (cache.kept_positions(each, b, head) for each in (layer, lead))
                assert torch.equal(ours, theirs)
                slots = (cache.layers[each].store.read(b, head)[2] for each in (layer, lead))
                assert torch.equal(*slots)  # scores are handed on slot by slot


def test_kv_compress_frees_whole_groups(model):
    cache = KVCompressCache(model, sharing=SHARED, **KV)
    rows = [prompt(n, seed=n)["input_ids"][0] for n in (60, 25)]
    model.generate(**left_padded(rows), past_key_values=cache, **LONG)
    same_group(cache, SHARED, 2)
    kept = cache.report().kept
    assert (-(-kept // 4)).sum((0, 2)).max() <= 20 * LAYERS * HEADS // 4  # the budget, in blocks over all rows
    assert len(set(kept[:, 0].flatten().tolist())) > 1  # and still ragged


@pytest.mark.parametrize(
    "make",
    [
        lambda model, sharing: KaraCache(model, sharing=sharing, compress_prompt=True, **KARA | {"retention": 0.25}),
        lambda model, sharing: KVCompressCache(model, sharing=sharing, **KV | {"max_cache_tokens": 60}),
    ],
    ids=["kara", "kv-compress"],
)
def test_bytes_multiply(model, make):
    """Kept share times what sharing leaves of it: 1 - (c / N) (1 - rho / 2 (1 - P / c)) of the full cache is saved."""
    sharing = dataclasses.replace(WIDE, sinks=1, recent=7)
    cache = make(model, sharing)
    model.generate(**prompt(300), past_key_values=cache, **LONG)
    report = cache.report()
    seen, kept = int(report.seen[0]), report.kept.double()
    share = float(kept.mean()) / seen
    followers = sharing.followers_share
    proximal = sharing.proximal / float(kept[1:].mean())  # of what a follower keeps
    values, keys = 0.5 * share, 0.5 * float(kept[0].sum() / kept.numel()) / seen + 0.5 * share * followers * proximal
    assert report.nominal_bytes / report.full_bytes == pytest.approx(values + keys, rel=0.02)
    alone = make(model, None)
    model.generate(**prompt(300), past_key_values=alone, **LONG)
    assert report.resident_bytes < 0.8 * alone.report().resident_bytes
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live_tensors(cache)}
    assert report.resident_bytes == sum(memory.values())


@pytest.mark.parametrize("cap", [40_000, slow(60_000)])
def test_kv_compress_with_sharing_evicts_harder_under_a_cap(model, cap):
    sharing = dataclasses.replace(SHARED, recent=20)
    cache = KVCompressCache(model, sharing=sharing, max_bytes=cap, **KV | {"max_cache_tokens": 400})
    model.generate(**prompt(200), past_key_values=cache, **LONG)
    report = cache.report()
    assert report.resident_bytes <= cap
    assert report.resident_bytes > 0.6 * cap  # and not much harder than it must
    same_group(cache, sharing, 1)


def test_turns_and_forks(model):
    ids = prompt(80, batch=2)["input_ids"]
    for cache in (
        KaraCache(model, sharing=SHARED, **KARA),
        KVCompressCache(model, sharing=SHARED, **KV),
    ):
        with torch.no_grad():
            for part in ids[:, :70].split([30, *[1] * 8, 20, *[1] * 12], 1):
                model(part, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1, 1, 0]))
            logits = model(ids[[1, 1, 0], 70:71], past_key_values=cache).logits
        close(logits[0], logits[1], 1e-5)
        same_group(cache, SHARED, 3)


def test_heads_of_one_level_hold_as_many_tokens(model):
    cache = KVCompressCache(model, sharing=SHARED, **KV | {"levels": 1})
    model.generate(**prompt(60), past_key_values=cache, **LONG)
    kept = cache.report().kept
    assert kept.min() == kept.max() <= 20
    same_group(cache, SHARED, 1)
