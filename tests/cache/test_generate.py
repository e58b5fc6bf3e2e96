"""What people who call `generate` expect to work with a compressed cache."""

import copy

import pytest
import torch
from support.architectures import build
from support.batches import left_padded, prompt
from support.marks import slow
from transformers import DynamicCache

from kara_hf import KaraCache, KVCompressCache, attach

SMALL = {"window": 16, "recent": 8, "block_size": 8}
LONG = {"max_new_tokens": 42, "do_sample": False}  # two windows are sealed


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.mark.parametrize("score", ["bidirectional", slow("random")])
@pytest.mark.parametrize("compress_prompt", [False, True])
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", *map(slow, ("llama", "deepseek-v3"))])
def test_left_padded_sequences_equal_single_runs(name, compress_prompt, score):
    model = build(name)
    rows = [prompt(n, seed=n)["input_ids"][0] for n in (33, 7, 1)]
    settings = {"retention": 0.25, "compress_prompt": compress_prompt, "score": score, **SMALL}
    batch = left_padded(rows)
    cache = KaraCache(model, **settings)
    together = model.generate(**batch, past_key_values=cache, **LONG)[:, batch["input_ids"].shape[1] :]
    for b, row in enumerate(rows):
        alone = KaraCache(model, **settings)
        single = model.generate(row[None], attention_mask=torch.ones(1, len(row)), past_key_values=alone, **LONG)
        assert single[0, len(row) :].tolist() == together[b].tolist()
        for layer in cache.report().layers:
            for head in range(cache.layers[layer].store.lengths.shape[1]):
                assert torch.equal(cache.kept_positions(layer, b, head), alone.kept_positions(layer, 0, head))
        assert cache.chunks(cache.report().layers[0], b) == alone.chunks(cache.report().layers[0])
        assert cache.report().seen[b] == alone.report().seen[0] == len(row) + 41


def test_sampling_gives_the_same_stream(model):
    outputs = []
    for cache in (DynamicCache(config=model.config), KaraCache(model, retention=1.0, **SMALL)):
        torch.manual_seed(5)
        outputs.append(
            model.generate(
                **prompt(),
                past_key_values=cache,
                do_sample=True,
                temperature=0.9,
                num_return_sequences=3,
                max_new_tokens=24,
            )
        )
    assert outputs[0].tolist() == outputs[1].tolist()
    assert outputs[0].shape[0] == 3


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_beam_search_equals_dynamic_cache(name):
    model = build(name)
    settings = {"num_beams": 3, "num_return_sequences": 2, **LONG, "max_new_tokens": 26}
    expected = model.generate(**prompt(batch=2), **settings)
    actual = model.generate(**prompt(batch=2), past_key_values=KaraCache(model, retention=1.0, **SMALL), **settings)
    assert actual.tolist() == expected.tolist()


def test_beams_share_blocks_instead_of_copying_them(model):
    cache = KaraCache(model, retention=0.5, **SMALL)
    model.generate(**prompt(64), past_key_values=cache, num_beams=4, **LONG)
    store = cache.layers[0].store
    assert (store.keys.refs > 1).sum() > 0
    rows = store.lengths.size
    separate = rows * -(-int(store.lengths.max()) // store.block_size)
    assert store.keys.held_blocks < separate
    before = [pool.data_ptr() for pool in store.keys.pools]
    ids = store.keys.table.clone()
    cache.reorder_cache(torch.tensor([2, 2, 0, 1]))
    assert [pool.data_ptr() for pool in store.keys.pools] == before
    assert torch.equal(store.keys.table[0], ids[2]) and torch.equal(store.keys.table[3], ids[1])


def test_beams_with_compression_equal_the_beams_decoded_one_by_one(model):
    """A beam's history is compressed as if it had been decoded alone, whatever was shared on the way."""
    cache = KaraCache(model, retention=0.5, **SMALL)
    out = model.generate(
        **prompt(24), past_key_values=cache, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, **LONG
    )
    for b in range(3):
        alone = KaraCache(model, retention=0.5, **SMALL)
        ids = out.sequences[b : b + 1, :-1]
        with torch.no_grad():
            for start, stop in [(0, 24), *((n, n + 1) for n in range(24, ids.shape[1]))]:
                model(input_ids=ids[:, start:stop], past_key_values=alone, use_cache=True)
        kept = {tuple(cache.kept_positions(1, row, 0).tolist()) for row in range(3)}
        assert tuple(alone.kept_positions(1).tolist()) in kept


def test_conversation_continues_with_the_same_cache(model):
    expected, actual = DynamicCache(config=model.config), KaraCache(model, retention=1.0, **SMALL)
    for cache in (expected, actual):
        ids = prompt(30)["input_ids"]
        cache.turns = []
        for turn in range(3):
            more = {"max_new_tokens": 28, "do_sample": False}
            ids = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **more)
            cache.turns.append(ids.tolist())
            ids = torch.cat([ids, prompt(12, seed=turn)["input_ids"]], dim=1)
    assert actual.turns == expected.turns


def test_a_turn_is_kept_whole_like_the_prompt(model):
    cache = KaraCache(model, retention=0.25, **SMALL)
    ids = model.generate(**prompt(30), past_key_values=cache, **LONG)
    ids = torch.cat([ids, prompt(12, seed=3)["input_ids"]], dim=1)
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **LONG)
    kept = set(cache.kept_positions(0).tolist())
    assert set(range(30)) <= kept  # the first prompt
    assert set(range(72, 84)) <= kept  # the second
    assert cache.report().kept.max() < cache.report().seen.max()
    kinds = [kind for _, _, kind in cache.chunks(0)]
    assert kinds.count("prompt") == 2


@pytest.mark.parametrize("chunk", [5, slow(16), 64])
def test_chunked_prefill(model, chunk):
    expected = model.generate(**prompt(47), **LONG)
    cache = KaraCache(model, retention=1.0, **SMALL)
    assert (
        model.generate(**prompt(47), past_key_values=cache, prefill_chunk_size=chunk, **LONG).tolist()
        == expected.tolist()
    )
    whole, parts = KaraCache(model, retention=0.25, **SMALL), KaraCache(model, retention=0.25, **SMALL)
    first = model.generate(**prompt(47), past_key_values=whole, **LONG)
    second = model.generate(**prompt(47), past_key_values=parts, prefill_chunk_size=chunk, **LONG)
    assert first.tolist() == second.tolist()
    assert whole.chunks(0) == parts.chunks(0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("how", ["assistant", "prompt-lookup"])
def test_assisted_decoding(name, how):
    model = build(name)
    extra = {"assistant_model": build(name, seed=1)} if how == "assistant" else {"prompt_lookup_num_tokens": 4}
    expected = model.generate(**prompt(), **LONG)
    cache = KaraCache(model, retention=1.0, **SMALL)
    assert model.generate(**prompt(), past_key_values=cache, **LONG, **extra).tolist() == expected.tolist()
    cache = KaraCache(model, retention=0.25, window=16, recent=24, block_size=8)
    model.generate(**prompt(), past_key_values=cache, **LONG, **extra)
    report = cache.report()
    assert report.seen.tolist() == [cache.get_seq_length()]
    assert report.kept.max() < report.seen.max()


def test_crop(model):
    cache = KaraCache(model, retention=0.25, **SMALL)
    out = model.generate(**prompt(), past_key_values=cache, **LONG)
    before = cache.kept_positions(0)
    open_tokens = 41 - 32
    with pytest.raises(ValueError, match=r"crop\(-10\) would reach into a sealed window.*recent"):
        cache.crop(-(open_tokens + 1))
    assert torch.equal(cache.kept_positions(0), before) and cache.get_seq_length() == 61
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    cache.crop(-open_tokens)
    assert cache.get_seq_length() == 61 - open_tokens
    assert cache.kept_positions(0).tolist() == before.tolist()[:-open_tokens]
    with torch.no_grad():  # and the dropped tokens come back the same
        model(out[:, 61 - open_tokens : 61], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 61


def test_crop_of_drafts_leaves_no_trace(model):
    """Tokens that were tried and taken back change nothing, however often."""
    ids = prompt(120)["input_ids"]
    plain, drafted = (KaraCache(model, retention=0.25, **SMALL) for _ in range(2))
    drafted.activate_past_recording()
    logits = {id(plain): [], id(drafted): []}
    with torch.no_grad():
        for cache in (plain, drafted):
            model(ids[:, :20], past_key_values=cache, use_cache=True)
        for n in range(20, 66):
            logits[id(plain)].append(model(ids[:, n : n + 1], past_key_values=plain, use_cache=True).logits[0, -1])
            wrong = torch.cat([ids[:, n : n + 1], torch.full((1, 5), 7)], dim=1)
            logits[id(drafted)].append(model(wrong, past_key_values=drafted, use_cache=True).logits[0, 0])
            drafted.crop(-5)
    assert drafted.get_seq_length() == plain.get_seq_length()
    assert drafted.chunks(0) == plain.chunks(0)  # drafts neither seal a window nor judge one


def test_reset_and_another_batch(model):
    cache = KaraCache(model, retention=0.25, **SMALL)
    first = model.generate(**prompt(batch=2), past_key_values=cache, **LONG)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.report().resident_bytes == 0
    again = model.generate(**prompt(batch=2), past_key_values=cache, **LONG)
    assert first.tolist() == again.tolist()
    cache.reset()
    model.generate(**prompt(batch=3), past_key_values=cache, **LONG)
    assert cache.batch_size == 3


def test_caches_on_one_model_do_not_disturb_each_other(model):
    settings = [{"retention": 0.25}, {"retention": 0.5, "score": "recency"}, {"retention": 1.0}]
    ids = prompt(66)["input_ids"]

    def run(caches):
        logits = []
        with torch.no_grad():
            for cache in caches:
                model(ids[:, :20], past_key_values=cache, use_cache=True)
            for n in range(20, 66):
                logits.append(
                    [model(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits for cache in caches]
                )
        return torch.stack([torch.stack(row) for row in logits])

    together = run([KaraCache(model, **SMALL, **each) for each in settings])
    for index, each in enumerate(settings):
        assert torch.equal(run([KaraCache(model, **SMALL, **each)])[:, 0], together[:, index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    model = build("llama").to(dtype)
    cache = KaraCache(model, retention=0.25, **SMALL)
    model.generate(**prompt(batch=2), past_key_values=cache, **LONG)
    assert cache.layers[0].store.keys.pools[0].dtype == dtype
    full = KaraCache(model, retention=1.0, **SMALL)
    dense = DynamicCache(config=model.config)
    ids = prompt(60)["input_ids"]
    with torch.no_grad():
        for cache in (full, dense):
            model(ids[:, :59], past_key_values=cache, use_cache=True)
        ours = model(ids[:, 59:], past_key_values=full, use_cache=True).logits.float()
        theirs = model(ids[:, 59:], past_key_values=dense, use_cache=True).logits.float()
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [KaraCache, KVCompressCache])
def test_autocast(model, make, dtype, padded):
    """Keys come out of the rotary embedding in float32, values in autocast's dtype; each is stored as it comes."""
    inputs = left_padded([prompt(n)["input_ids"][0] for n in (60, 23)]) if padded else prompt(60, batch=2)
    ours, theirs = make(model, retention=1.0, block_size=8), DynamicCache(config=model.config)
    got = []
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        for cache in (ours, theirs):
            parts = []
            for start, stop in ((0, 50), (50, 57), (57, 58), (58, 59), (59, 60)):  # a prompt, a turn, single tokens
                given = {"input_ids": inputs["input_ids"][:, start:stop], "past_key_values": cache, "use_cache": True}
                places = inputs["attention_mask"].cumsum(1)[:, start:stop].sub(1).clamp(min=0)
                mask = inputs["attention_mask"][:, :stop]
                parts.append(model(**given, attention_mask=mask, position_ids=places).logits[:, -1])
            got.append(torch.stack(parts).float())
        torch.testing.assert_close(*got, atol=0.05, rtol=0.05)
        tokens = model.generate(**inputs, past_key_values=make(model, retention=0.5, block_size=8), **LONG)
    assert tokens.shape[1] == 102
    store = ours.layers[0].store
    assert (store.keys.pools[0].dtype, store.values.pools[0].dtype) == (torch.float32, dtype)
    assert store.stored_bytes == int(store.lengths.sum()) * model.config.head_dim * (4 + 2)


def test_peft_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config).eval()
    expected = model.generate(**prompt(), **LONG)
    assert (
        model.generate(**prompt(), past_key_values=KaraCache(model, retention=1.0, **SMALL), **LONG).tolist()
        == expected.tolist()
    )
    assert model.config._attn_implementation == "sdpa"


def test_dispatched_model():
    """A model whose layers accelerate moves inputs to; every layer's pool is made where its keys are."""
    accelerate = pytest.importorskip("accelerate")
    mapped = build("llama")
    expected = mapped.generate(**prompt(), **LONG)
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    parts |= {f"model.layers.{n}": "cpu" for n in range(3)}
    mapped = accelerate.dispatch_model(mapped, parts, main_device="cpu", force_hooks=True)
    cache = KaraCache(mapped, retention=1.0, **SMALL)
    assert mapped.generate(**prompt(), past_key_values=cache, **LONG).tolist() == expected.tolist()


def test_other_caches_while_attached():
    model = build("llama")
    plain = model.generate(**prompt(batch=2), **LONG)
    logits = model(**prompt()).logits
    with attach(model):
        assert model.generate(**prompt(batch=2), **LONG).tolist() == plain.tolist()
        dynamic = DynamicCache(config=model.config)
        assert model.generate(**prompt(batch=2), past_key_values=dynamic, **LONG).tolist() == plain.tolist()
        assert model.generate(**prompt(batch=2), use_cache=False, **LONG).tolist() == plain.tolist()
        assert torch.equal(model(**prompt()).logits, logits)
    assert model.config._attn_implementation == "sdpa"

    assert not model.config.to_json_string().count("kara_hf")


def test_a_copied_cache_goes_on_by_itself(model):
    """A prompt is processed once and continued several times from copies of its cache."""
    start = KaraCache(model, retention=0.5, **SMALL)
    first = model.generate(**prompt(40), past_key_values=start, **LONG)
    copies = [copy.deepcopy(start) for _ in range(2)]
    before = start.report().to_dict()
    ids = torch.cat([first, prompt(9)["input_ids"]], dim=1)
    outputs = [
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **LONG).tolist()
        for cache in copies
    ]
    assert outputs[0] == outputs[1]
    assert start.report().to_dict() == before


def test_batch_select_and_repeat(model):
    cache = KaraCache(model, retention=0.5, **SMALL)
    ids = prompt(60, batch=3)["input_ids"]
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        for n in range(20, 59):
            model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
        reference = copy.deepcopy(cache)
        expected = model(ids[:, 59:], past_key_values=reference, use_cache=True).logits
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        order = torch.tensor([2, 2, 0, 0])
        actual = model(ids[order, 59:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(actual, expected[order])
    assert cache.batch_size == 4


def test_an_interrupted_step_is_taken_back(model):
    cache = KaraCache(model, retention=0.5, **SMALL)
    ids = prompt(60)["input_ids"]
    with torch.no_grad():
        for start, stop in [(0, 20), *((n, n + 1) for n in range(20, 50))]:
            model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        reference = copy.deepcopy(cache)

        def interrupt(*args):
            raise KeyboardInterrupt

        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 50:51], past_key_values=cache, use_cache=True)
        handle.remove()
        assert cache.report().to_dict()["kept"] == reference.report().to_dict()["kept"]
        for n in range(50, 60):
            ours = model(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits
            theirs = model(ids[:, n : n + 1], past_key_values=reference, use_cache=True).logits
            assert torch.equal(ours, theirs)
        for mine, other in zip(cache.compressed_layers, reference.compressed_layers, strict=True):
            assert all(map(torch.equal, mine.state.tensors(), other.state.tensors()))


def test_positions_after_compression_are_true_ones(model):
    cache = KaraCache(model, retention=0.25, **SMALL)
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0, -1].item()), with_kwargs=True
    )
    try:
        model.generate(**prompt(), past_key_values=cache, **LONG)
        with torch.no_grad():
            model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)  # without explicit position_ids
    finally:
        handle.remove()
    assert seen == [*range(19, 61), 61]


def test_an_own_implementation_that_looks_itself_up_by_name_finds_its_name():
    """As flash attention does, which loads its kernel by what the config says; simulated, since it needs a GPU."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    names = []

    def named(module, *args, **kwargs):
        names.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    model = build("llama")
    expected = model.generate(**prompt(), **LONG)
    AttentionInterface.register("flash_like", named)
    AttentionMaskInterface.register("flash_like", sdpa_mask)
    model.config._attn_implementation = "flash_like"
    out = model.generate(**prompt(), past_key_values=KaraCache(model, retention=1.0, **SMALL), **LONG)
    assert out.tolist() == expected.tolist() and set(names) == {"flash_like"}
    assert model.config._attn_implementation == "flash_like"


@pytest.mark.parametrize("modes", ["i", "ni", "gi", slow("in"), slow("ig")])
@pytest.mark.parametrize("kind", ["kara", "kv-compress"])
def test_any_mix_of_inference_no_grad_and_grad_mode(kind, modes):
    """What is stored in one mode is written, rearranged and cropped in another."""
    model = build("llama")
    ids, mask = torch.randint(3, 100, (2, 50)), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    contexts = {"i": torch.inference_mode, "n": torch.no_grad, "g": torch.enable_grad}

    def steps(modes):
        if kind == "kara":
            cache = KaraCache(model, retention=0.5, **SMALL)
        else:
            cache = KVCompressCache(model, max_cache_tokens=24, protected=4, sinks=2, block_size=4)
        logits, seen = [], mask
        for number, stop in enumerate(range(20, 51)):
            with contexts[modes[number % len(modes)]]():
                part = slice(0 if number == 0 else stop - 1, stop)
                out = model(ids[:, part], attention_mask=seen[:, :stop], past_key_values=cache, use_cache=True)
                logits.append(out.logits[:, -1].detach().clone())
            if number in (0, 20):
                cache.compress()
            if number == 12:
                cache.reorder_cache(torch.tensor([0, 0]))
                seen = mask[[0, 0]]
        cache.crop(-1)
        return torch.stack(logits)

    assert torch.equal(steps(modes), steps("n"))
