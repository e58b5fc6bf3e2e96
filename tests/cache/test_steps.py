"""A step is committed when the model's forward is done, whichever layers ran; modes end with the call they are of."""

import pytest
import torch
from support.architectures import build
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from kara_hf import KaraCache, KVCompressCache, PoDCache, PoDSharing

SMALL = {"window": 16, "recent": 8, "block_size": 4}
TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LAYERS = 4
LOSSLESS = {
    "kara": lambda model: KaraCache(model, retention=1.0, **SMALL),
    "kv-compress": lambda model: KVCompressCache(model, retention=1.0, protected=8, block_size=4),
    "pod": lambda model: PoDCache(model, PoDSharing.none(LAYERS, 2, sinks=1, recent=5), block_size=4),
}
IDS = torch.arange(24)[None] % 80 + 5


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **TINY)).eval()


def skip(model, layer):
    model.model.layers[layer].forward = lambda hidden, *args, **kwargs: hidden
    return model


def remove(model, layer):
    model.model.layers = torch.nn.ModuleList(each for i, each in enumerate(model.model.layers) if i != layer)
    return model


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("change", [skip, remove])
@pytest.mark.parametrize("kind", sorted(LOSSLESS))
def test_a_layer_that_never_runs_is_left_out(kind, change, layer):
    model = change(llama(), layer)
    cache = LOSSLESS[kind](model)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits  # DynamicCache counts from its layer 0, which may be empty
        for start, stop in ((0, 20), (20, 21), (21, 24)):
            logits = model(IDS[:, start:stop], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, start:stop], atol=2e-5, rtol=1e-4)
    report = cache.report()
    assert report.seen.tolist() == [24] and layer not in report.layers and len(report.layers) == LAYERS - 1
    with pytest.raises(IndexError, match=f"layer {layer} stores nothing here"):
        cache.kept_positions(layer)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([0]))
    assert cache.get_seq_length() == 22


@pytest.mark.parametrize("kind", sorted(LOSSLESS))
def test_a_layer_that_runs_only_sometimes_is_refused(kind):
    model = llama()
    cache = LOSSLESS[kind](model)
    model(IDS, past_key_values=cache)
    held = cache.report().kept.tolist()
    whole = model.model.layers[2].forward
    skip(model, 2)
    with pytest.raises(ValueError, match=r"layers \[2\] of LlamaForCausalLM did not run in this step but hold earlier"):
        model(IDS[:, :1], past_key_values=cache)
    assert cache.report().kept.tolist() == held and cache.get_seq_length() == 24
    model.model.layers[2].forward = whole
    model(IDS[:, :1], past_key_values=cache)
    later = LOSSLESS[kind](skip(model, 2))
    model(IDS, past_key_values=later)
    model.model.layers[2].forward = whole
    with pytest.raises(ValueError, match="layer 2 of LlamaForCausalLM runs for the first time"):
        model(IDS[:, :1], past_key_values=later)
    assert later.get_seq_length() == 24


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", sorted(LOSSLESS))
def test_a_forward_that_fails_behind_the_attention_is_taken_back(kind, first):
    model = llama()
    cache = LOSSLESS[kind](model)
    expected = model(IDS, past_key_values=LOSSLESS[kind](model)).logits
    if not first:
        model(IDS[:, :20], past_key_values=cache)
    whole = model.model.layers[2].mlp.forward
    model.model.layers[2].mlp.forward = lambda hidden: 1 / 0
    part = IDS if first else IDS[:, 20:]
    with pytest.raises(ZeroDivisionError):
        model(part, past_key_values=cache)
    assert cache.get_seq_length() == (0 if first else 20)
    model.model.layers[2].mlp.forward = whole
    logits = model(part, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, -part.shape[1] :], atol=2e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- modes
def goes_on_with_drafts(model, prompt, turn):
    cache = DynamicCache(config=model.config)
    first = model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
    whole = torch.cat([first, turn], 1)
    out = model.generate(whole, past_key_values=cache, max_new_tokens=3, prompt_lookup_num_tokens=4, do_sample=False)
    return cache.get_seq_length() <= out.shape[1]


@pytest.mark.parametrize("second", [{}, {"prompt_lookup_num_tokens": 4}], ids=["plain", "assisted"])
@pytest.mark.parametrize("recent", [8, 32])
def test_a_turn_after_assisted_decoding_is_a_turn(recent, second):
    """Drafts are of the call that made them: the next message is kept whole, as it is without."""
    model, settings = build("llama"), {"window": 64, "recent": recent, "block_size": 4}
    prompt, turn = torch.randint(3, 90, (1, 6)).repeat(1, 5), torch.randint(3, 90, (1, 7))
    if second and not goes_on_with_drafts(model, prompt, turn):
        pytest.skip("this version of Transformers reads everything anew there, with its own cache too")
    for extra in ({}, {"prompt_lookup_num_tokens": 4}):
        cache = KaraCache(model, retention=0.25, **settings)
        first = model.generate(prompt, past_key_values=cache, max_new_tokens=24, do_sample=False, **extra)
        whole = torch.cat([first, turn], 1)
        model.generate(whole, past_key_values=cache, max_new_tokens=100, do_sample=False, **second)
        places = set(range(first.shape[1], whole.shape[1]))
        for layer in range(3):
            for head in range(2):
                assert places <= set(cache.kept_positions(layer, 0, head).tolist())


def test_recording_ends_when_the_next_call_begins():
    model = build("llama")
    cache = KVCompressCache(model, max_cache_tokens=32, protected=8, sinks=2, block_size=4)
    prompt = torch.randint(3, 90, (1, 6)).repeat(1, 5)
    first = model.generate(prompt, past_key_values=cache, max_new_tokens=10, prompt_lookup_num_tokens=3)
    assert all(layer.record_past for layer in cache.layers)
    model.generate(torch.cat([first, prompt[:, :5]], 1), past_key_values=cache, max_new_tokens=10)
    assert not any(layer.record_past for layer in cache.layers)


# ------------------------------------------------------------------------------------------- the cache that was given
def phi3(switch):
    half = 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [3.0] * half,
        "original_max_position_embeddings": switch,
        "factor": 10.0,
    }
    torch.manual_seed(0)
    config = Phi3Config(
        num_hidden_layers=3,
        original_max_position_embeddings=switch,
        rope_parameters=rope,
        **TINY | {"eos_token_id": 96},
    )
    model = Phi3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("kind", ["kara", "kv-compress"])
def test_a_model_that_drops_its_cache_is_stopped(kind):
    """LongRoPE computes everything anew where its factors change, with a cache of its own."""
    model = phi3(switch=40)
    cache = LOSSLESS[kind](model)
    with pytest.raises(ValueError, match=r"drops the cache.*has seen 40 tokens.*original_max_position_embeddings=40"):
        model.generate(IDS[:, :20], past_key_values=cache, max_new_tokens=60, do_sample=False)
    assert cache.get_seq_length() == 40
    model.generate(IDS[:, :20], past_key_values=LOSSLESS[kind](model), max_new_tokens=20, do_sample=False)


@pytest.mark.parametrize("kind", ["kara", "kv-compress"])
def test_a_prompt_beyond_the_switch_uses_the_cache(kind):
    model, prompt = phi3(switch=16), IDS[:, :20]
    expected = model.generate(prompt, max_new_tokens=30, do_sample=False)
    cache = LOSSLESS[kind](model)
    found = model.generate(prompt, past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert found.tolist() == expected.tolist() and cache.get_seq_length() == 49


# ------------------------------------------------------------------------------------------------------------- autocast
@pytest.mark.parametrize("kind", sorted(LOSSLESS))
@pytest.mark.parametrize("how", ["one", "padded", "beams"])
def test_generate_under_autocast(kind, how):
    """Rotated keys are float32 there, and values bfloat16."""
    model = llama()
    ids, more = IDS.repeat(2 if how == "padded" else 1, 1), {"num_beams": 3} if how == "beams" else {}
    mask = torch.ones_like(ids)
    if how == "padded":
        mask[1, :6] = 0
    outs = []
    for make in (lambda: DynamicCache(config=model.config), lambda: LOSSLESS[kind](model)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    past_key_values=make(),
                    max_new_tokens=12,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                    **more,
                )
            )
    torch.testing.assert_close(outs[1].logits[1], outs[0].logits[1], atol=0.1, rtol=0.1)
    assert outs[1].sequences.shape == outs[0].sequences.shape


@pytest.mark.parametrize("score", ["blend", "key-difference", "bidirectional"])
def test_what_is_kept_is_chosen_outside_autocast(score):
    """A score multiplies in the dtypes of what it is given, wherever the model runs."""
    model, judged = llama(), []
    cache = KaraCache(model, retention=0.5, score=score, compress_prompt=True, **SMALL)
    cache.policy.watch = lambda window, scores: judged.append((window, scores))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS.repeat(1, 2), past_key_values=cache)
        for token in range(20):
            model(IDS[:, token : token + 1], past_key_values=cache)
    assert len(judged) > 2 * LAYERS
    for window, scores in judged:
        assert torch.equal(scores, cache.policy.score.rank(window))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("first", [True, False], ids=["prompt", "step"])
def test_a_forward_that_was_compiled_later_is_refused_while_it_is_traced(first):
    model = llama()
    cache = KaraCache(model, retention=0.5, **SMALL)
    if not first:
        model(IDS, past_key_values=cache)
    seen, own = cache.get_seq_length(), model.forward
    model.forward = torch.compile(own, backend="eager")
    with pytest.raises(ValueError, match=r"is compiled \(torch.compile\).*cuda_graph=True"):
        model(IDS if first else IDS[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == seen
    del model.forward
    model(IDS[:, :5], past_key_values=cache)
    assert cache.get_seq_length() == seen + 5
