"""What a mask says on later steps: honoured as by the full cache, or refused before anything is stored."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import build
from support.marks import most_examples
from transformers import DynamicCache

from kara_hf import KaraCache, KVCompressCache, PoDCache, PoDSharing
from kara_hf.cache.masks import read_mask

SMALL = {"window": 16, "recent": 8, "block_size": 4}
SHARED = PoDSharing(lead=((0, 0), (0, 1), (0, 1)), sinks=1, recent=5)


def own_keys(model):
    return PoDSharing.none(model.config.num_hidden_layers, model.config.num_key_value_heads, sinks=1, recent=5)


CACHES = {
    "kara": lambda model: KaraCache(model, retention=1.0, **SMALL),
    "kv-compress": lambda model: KVCompressCache(model, retention=1.0, protected=4, sinks=2, block_size=4),
    "pod": lambda model: PoDCache(model, own_keys(model), block_size=4),
}


def ids(batch, tokens, seed=0):
    return torch.randint(3, 90, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def positions(mask, new):
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]


@torch.no_grad()
def run(model, cache, text, masks):
    """Logits of steps that end where their masks do, positions counted as `generate` counts them."""
    logits, start = [], 0
    for mask in masks:
        part = text[:, start : mask.shape[-1]]
        place = positions(mask, part.shape[1]) if mask.ndim == 2 else None
        logits.append(model(part, attention_mask=mask, position_ids=place, past_key_values=cache).logits)
        start = mask.shape[-1]
    return logits


def assert_same(found, expected, masks):
    for logits, right, mask in zip(found, expected, masks, strict=True):
        real = mask[:, -logits.shape[1] :].bool() if mask.ndim == 2 else slice(None)
        torch.testing.assert_close(logits[real], right[real], atol=2e-5, rtol=1e-4)


def widths(*ends):
    """Masks of ones over two sequences up to each of the ends."""
    return [torch.ones(2, end, dtype=torch.long) for end in ends]


@pytest.mark.parametrize(  # multi-head latent attention, which has a row for all heads, under Kara alone
    ("kind", "name"), [*itertools.product(sorted(CACHES), ["llama", "gemma2"]), ("kara", "deepseek-v3")]
)
def test_tokens_that_a_mask_hides_later_are_hidden(kind, name):
    """Pads behind an early end, and holes: from a turn on, and in all decode steps behind it."""
    model = build(name)
    if name == "gemma2":  # whose soft cap sdpa leaves out
        model.set_attn_implementation("eager")
    text, masks = ids(2, 40), widths(20, 24, 30, 31, 32, 40)
    masks[0][0, :3] = 0
    for mask in masks[1:]:
        mask[0, :3] = 0
    for mask in masks[2:]:
        mask[0, 21:24] = 0  # pads behind an early end
        mask[1, 7] = 0  # a hole
    expected = run(model, DynamicCache(config=model.config), text, masks)
    cache = CACHES[kind](model)
    assert_same(run(model, cache, text, masks), expected, masks)


@pytest.mark.parametrize("kind", sorted(CACHES))
def test_what_was_hidden_may_be_shown_again(kind):
    model, text, masks = build("llama"), ids(2, 34), widths(20, 26, 27, 34)
    masks[1][0, 4:9] = masks[2][0, 4:9] = 0
    masks[2][1, 12] = 0
    expected = run(model, DynamicCache(config=model.config), text, masks)
    assert_same(run(model, CACHES[kind](model), text, masks), expected, masks)


def test_shared_keys_hide_tokens_too():
    """Where every token is proximal, shared keys are never used, and hiding must be that of the full cache."""
    model, text, masks = build("llama"), ids(2, 34), widths(20, 26, 27, 28, 34)
    for mask in masks[1:]:
        mask[:, 5:8] = 0
    near = PoDSharing(lead=SHARED.lead, sinks=1, recent=64)
    expected = run(model, DynamicCache(config=model.config), text, masks)
    assert_same(run(model, PoDCache(model, near, block_size=4), text, masks), expected, masks)
    shown = run(model, PoDCache(model, SHARED, block_size=4), text, widths(20, 26, 27, 28, 34))
    for part, other in zip(run(model, PoDCache(model, SHARED, block_size=4), text, masks)[1:], shown[1:], strict=True):
        assert torch.isfinite(part).all() and not torch.allclose(part, other, atol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", sorted(CACHES))
def test_a_mask_of_four_dimensions(kind, implementation):
    """Who sees whom, row by row: blocks, and queries that see each other."""
    model = build("llama")
    model.set_attn_implementation(implementation)
    text = ids(2, 26)

    def masks(form):
        first = torch.ones(20, 20, dtype=torch.bool).tril()
        second = torch.ones(5, 25, dtype=torch.bool).tril(20)
        second[1:3, 4:11] = False
        second[0, 22] = True  # looks ahead
        third = torch.ones(1, 26, dtype=torch.bool)
        third[0, :6] = False
        whole = [part.expand(2, 1, -1, -1) for part in (first, second, third)]
        if form == "bool":
            return whole
        return [torch.zeros(part.shape).masked_fill(~part, torch.finfo(torch.float32).min) for part in whole]

    form = "bool" if implementation == "sdpa" else "float"
    expected = run(model, DynamicCache(config=model.config), text, masks(form))
    assert_same(run(model, CACHES[kind](model), text, masks(form)), expected, masks(form))


@pytest.mark.parametrize("kind", sorted(CACHES))
def test_padding_that_a_later_mask_shows_is_refused(kind):
    model, text = build("llama"), ids(2, 24)
    cache = CACHES[kind](model)
    first, later = widths(20, 24)
    first[1, :6] = 0
    run(model, cache, text, [first])
    held, seen = cache.report().kept.tolist(), cache.report().seen.tolist()
    with pytest.raises(ValueError, match=r"shows column 0, which was padding when it was seen.*reset\(\)"):
        model(text[:, 20:], attention_mask=later, past_key_values=cache)
    assert cache.report().kept.tolist() == held and cache.report().seen.tolist() == seen
    later[1, :6] = 0
    model(text[:, 20:], attention_mask=later, past_key_values=cache)


def test_masks_that_cannot_be_honoured_are_refused():
    model, text = build("llama"), ids(2, 24)
    cache = KaraCache(model, retention=1.0, **SMALL)
    run(model, cache, text, widths(20))
    held = cache.report().kept.tolist()
    biased = torch.zeros(2, 1, 4, 24)
    biased[..., 3] = -0.5
    heads = torch.ones(2, 4, 4, 24, dtype=torch.bool).tril(20)
    heads[:, 1, :, 2] = False
    for mask, why in (
        (biased, "adds a bias"),
        (heads, "differs between heads"),
        (heads[:, :1, :, :20], "24 tokens seen"),
    ):
        with pytest.raises(ValueError, match=why):
            model(text[:, 20:], attention_mask=mask, past_key_values=cache)
        assert cache.report().kept.tolist() == held
    with pytest.raises(ValueError, match="not that of causal sequences, which shared keys do not support"):
        shared = PoDCache(model, SHARED, block_size=4)
        run(model, shared, text, widths(20))
        model(text[:, 20:], attention_mask=torch.ones(2, 1, 4, 24, dtype=torch.bool), past_key_values=shared)


@most_examples(25)
@given(data=st.data())
def test_any_masks_over_any_steps(data):
    """Zeros anywhere, coming and going, in steps of any size: logits are those of the full cache."""
    model = build("llama")
    ends, seen = [], 0
    for _ in range(data.draw(st.integers(2, 5))):
        seen += data.draw(st.sampled_from([1, 1, 2, 5, 9])) if ends else 12
        ends.append(seen)
    text, masks, stored = ids(2, seen, seed=data.draw(st.integers(0, 99))), [], torch.zeros(2, 0, dtype=torch.bool)
    for end in ends:
        drawn = data.draw(st.lists(st.booleans(), min_size=2 * end, max_size=2 * end))
        mask = torch.tensor(drawn).view(2, end) | (torch.rand(2, end) < 0.5)
        mask[:, -1] = True
        mask[:, : stored.shape[1]] &= stored
        stored = torch.cat([stored, mask[:, stored.shape[1] :]], 1)
        masks.append(mask.long())
    kind = data.draw(st.sampled_from(sorted(CACHES)))
    expected = run(model, DynamicCache(config=model.config), text, masks)
    assert_same(run(model, CACHES[kind](model), text, masks), expected, masks)


def test_a_mask_of_ones_is_read_once():
    """One look, whatever the length: nothing is built of it."""
    mask = torch.ones(8, 1, 1, 4096, dtype=torch.bool)
    found = read_mask(mask, 8, 4095, 1, None, "a model")
    assert found.real is None and found.visibility is None
    padding = torch.ones(8, 100, dtype=torch.bool)
    padding[0, :50] = mask[0, ..., :50] = False
    found = read_mask(mask, 8, 4095, 1, padding, "a model")
    assert found.real is None and found.visibility is None
