"""Exploration for PoD: how alike layers attend, the groups that follow, the samples it takes, and its command."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kara_hf import PoDSharing
from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.cli import app as cli
from kara_hf.integration.attention import decoder_config, is_attached
from kara_hf.pod import explore as exploring
from kara_hf.pod import plot as plotting
from kara_hf.pod.explore import LayerSimilarity, explore, js_divergence
from kara_hf.pod.forward import SharedForward
from kara_hf.pod.similarity import groups_of
from kara_hf.probing.data import token_samples
from kara_hf.tasks.reasoner import VOCABULARY, final_answer, split_of

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = "problems:trace=0.5,fact=0.2,recall=0.3"


def ids(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 128, (tokens,), generator=torch.Generator().manual_seed(seed))


def made(similarity, *, kinds=None, devices=None, **changes) -> LayerSimilarity:
    """A similarity by hand: ``[H, L, L]``, or for one head ``[L, L]``."""
    similarity = torch.as_tensor(similarity, dtype=torch.float32)
    similarity = similarity[None] if similarity.ndim == 2 else similarity
    layers = similarity.shape[1]
    fields = {"tokens": (64, 64), "queries": 4, "region": "all", "sinks": 2, "recent": 6, "model": {}} | changes
    return LayerSimilarity(similarity, kinds or ("full",) * layers, devices or ("cpu",) * layers, **fields)


def symmetric(entries: dict[tuple[int, int], float], layers: int) -> torch.Tensor:
    out = torch.eye(layers)
    for (a, b), value in entries.items():
        out[a, b] = out[b, a] = value
    return out


def drawn(seed: int, heads: int = 2, layers: int = 7) -> LayerSimilarity:
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(heads, layers, layers, generator=rng).mul(20).round().div(20)  # ties are common
    upper = values.triu(1)
    return made(upper + upper.mT + torch.eye(layers))


def leads(sharing: PoDSharing, head: int = 0) -> list[int]:
    return [heads[head] for heads in sharing.lead]


# ------------------------------------------------------------------------------------------------------ the divergence
def js_by_hand(p: list[float], q: list[float]) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log2(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_js_divergence_is_that_of_its_definition(layers, count, tokens, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = 8 * torch.randn(layers, count, tokens, generator=rng)
    hidden = torch.rand(layers, count, tokens, generator=rng) < 0.4
    hidden[..., 0] = False
    rows = logits.masked_fill(hidden, -math.inf).softmax(-1)
    found = js_divergence(rows)
    assert found.shape == (layers, layers, count) and found.dtype == torch.float32
    assert (found >= 0).all() and (found <= 1).all()
    assert torch.equal(found, found.transpose(0, 1))
    for a, b, row in itertools.product(range(layers), range(layers), range(count)):
        assert found[a, b, row].item() == pytest.approx(
            js_by_hand(rows[a, row].tolist(), rows[b, row].tolist()), abs=2e-6
        )


def test_js_divergence_at_its_ends():
    flat, left, right = torch.full((4,), 0.25), torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0.5, 0.5, 0])
    found = js_divergence(torch.stack([flat, left, flat, right])[:, None])[..., 0]
    assert found[0, 2] == 0 and found.diagonal().eq(0).all()
    assert found[1, 3] == 1  # nothing in common


# --------------------------------------------------------------------------------------------- what a model is measured
def by_definition(model, samples, queries, near=None):
    """From the attention that Transformers returns: ``[H, L, L]`` float64."""
    model.set_attn_implementation("eager")
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    total = torch.zeros(heads, layers, layers, dtype=torch.float64)
    for sample in samples:
        with torch.no_grad():
            attentions = model(sample[None], output_attentions=True, use_cache=False).attentions
        rows = torch.stack([attention[0, :, -queries:] for attention in attentions]).double()  # [L, Hq, Q, N]
        if near is not None:
            sinks, recent = near
            at = torch.arange(len(sample))[-queries:, None]
            place = torch.arange(len(sample))
            rows = rows * ((place >= sinks) & (place <= at - recent))
            rows = rows / rows.sum(-1, keepdim=True)
        else:
            rows = torch.cat([rows, 1 - rows.sum(-1, keepdim=True)], -1).clamp_min(0)  # what a sink takes
        rows = rows.unflatten(1, (heads, -1)).flatten(2, 3)
        for head, a, b in itertools.product(range(heads), range(layers), range(layers)):
            pairs = zip(rows[a, head].tolist(), rows[b, head].tolist(), strict=True)
            total[head, a, b] += 1 - np.mean([js_by_hand(p, q) for p, q in pairs])
    return total / len(samples)


# gemma2 caps its scores, granite scales them in its own way, gpt-oss has attention sinks, gemma3 a window in two layers
@pytest.mark.parametrize("region", ["all", "distant"])
@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "gemma3", "gpt-oss"])
def test_similarity_is_that_of_the_attention_that_the_model_computes(name, region):
    model = build(name)
    model.set_attn_implementation(ARCHITECTURES[name].implementations[0])
    samples, near = [ids(24), ids(21, 1)], (2, 9) if region == "distant" else None
    found = explore(model, iter(samples), queries=5, region=region, sinks=2, recent=9)
    expected = by_definition(build(name), samples, 5, near)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    full = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    assert [layer for layer, kind in enumerate(found.kinds) if kind] == full
    measured = torch.zeros(found.layers, found.layers, dtype=torch.bool)
    measured[torch.tensor(full)[:, None], torch.tensor(full)] = True
    assert (found.similarity.isnan() == ~measured).all()
    torch.testing.assert_close(found.similarity[:, measured].double(), expected[:, measured], atol=5e-6, rtol=0)
    assert (found.similarity.diagonal(0, 1, 2)[:, full] == 1).all()
    assert torch.equal(found.similarity.nan_to_num(), found.similarity.mT.nan_to_num())
    assert found.similarity[:, measured].min() < 0.9  # the layers do differ


def test_layers_that_compute_the_same_are_alike():
    model = build("llama")
    below, above = model.model.layers[:2]
    for projection in (below.self_attn.o_proj, below.mlp.down_proj):  # so that layer 1 sees what layer 0 saw
        torch.nn.init.zeros_(projection.weight)
    above.self_attn.load_state_dict(below.self_attn.state_dict())
    above.input_layernorm.load_state_dict(below.input_layernorm.state_dict())
    found = explore(model, [ids(20)], queries=4)
    assert (found.similarity[:, 0, 1] == 1).all() and (found.similarity[:, 0, 2] < 0.99).all()
    assert found.group(1.0).lead == ((0, 0), (0, 0), (2, 2))


def test_memory_is_bounded_and_the_result_does_not_depend_on_the_bound(monkeypatch):
    model, tokens = build("llama"), 40
    whole = explore(model, [ids(tokens)], queries=8).similarity
    shapes = []

    def watched(rows):
        shapes.append(rows.shape)
        return js_divergence(rows)

    monkeypatch.setattr(exploring, "js_divergence", watched)
    row = 16 * model.config.num_hidden_layers * (tokens + 1)  # bytes: rows, their entropies, means, and theirs
    for budget, most in ((1, 1), (3 * row, 3), (5 * row + 1, 5)):
        monkeypatch.setattr(exploring, "ROW_BYTES", budget)
        shapes.clear()
        found = explore(model, [ids(tokens)], queries=8).similarity
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
        assert max(count for _, count, _ in shapes) == most
        assert sum(count for _, count, _ in shapes) == model.config.num_attention_heads * 8


def test_the_keys_of_a_sample_are_gone_when_the_next_is_run(monkeypatch):
    run, seen = exploring.Recorder.run, []

    def watched(self, *args):
        assert all(layer() is None for layer in seen)
        layers = run(self, *args)
        seen.extend(map(weakref.ref, layers))
        return layers

    monkeypatch.setattr(exploring.Recorder, "run", watched)
    explore(build("llama"), [ids(20), ids(20, 1), ids(20, 2)], queries=2)
    assert len(seen) == 9


def test_what_is_measured_is_written_down():
    done = []
    found = explore(build("llama"), [ids(20), ids(30)], queries=3, sinks=1, recent=5, progress=done.append)
    assert done == [1, 2]
    assert (found.tokens, found.queries, found.region, found.sinks, found.recent) == ((20, 30), 3, "all", 1, 5)
    assert found.devices == ("cpu",) * 3 and found.kinds == ("full_attention, 2 KV heads of 16",) * 3
    assert found.model["num_hidden_layers"] == 3 and found.origin["dtype"] == "float32"
    sharing = found.group(0.0)
    assert sharing.model == found.model and (sharing.sinks, sharing.recent) == (1, 5)
    wanted = {"samples": 2, "tokens": 50, "queries": 3, "region": "all", "threshold": 0.0, "compare": "lead"}
    assert sharing.origin.items() >= wanted.items()
    sharing.check(decoder_config(build("llama")))
    with SharedForward(build("llama"), sharing) as shared:
        shared.model(ids(20)[None], use_cache=False)


def test_the_model_is_left_as_it_was():
    model = build("llama").train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    explore(model, [ids(20)], queries=2)
    with pytest.raises(ValueError, match="sample 1 has 2 tokens"):
        explore(model, [ids(20), ids(2)], queries=2)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not is_attached(model.config)
    assert not any("attention_hook" in vars(module) for module in model.modules())


def test_what_cannot_be_measured_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="sample 0 has 4 tokens and needs 5: queries=4 and one more"):
        explore(model, [ids(4)], queries=4)
    with pytest.raises(ValueError, match="sample 0 has 30 tokens and needs 31: queries=4, sinks=7 and recent=20"):
        explore(model, [ids(30)], queries=4, region="distant", sinks=7, recent=20)
    assert explore(model, [ids(31)], queries=4, region="distant", sinks=7, recent=20).similarity.isfinite().all()
    with pytest.raises(ValueError, match="no sample"):
        explore(model, [])
    with pytest.raises(ValueError, match=r"token ids \[N\] int64, got \[1, 40\]"):
        explore(model, [ids(40)[None]])
    with pytest.raises(ValueError, match="token ids"):
        explore(model, [ids(40).float()])
    for name, value in (("queries", 0), ("region", "near"), ("sinks", -1), ("recent", 0)):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not possible"):
            explore(model, [ids(40)], **{name: value})
    with pytest.raises(ValueError, match="no full-attention layer"):
        explore(build("mistral-sliding"), [ids(40)])
    with pytest.raises(ValueError, match="computes its attention itself"):
        explore(build("falcon-new"), [ids(40)])
    with pytest.raises(TypeError, match="expected a Transformers model"):
        explore(torch.nn.Linear(2, 2), [ids(40)])
    with SharedForward(model, PoDSharing.none(3, 2)), pytest.raises(ValueError, match="share keys already"):
        explore(model, [ids(40)])
    torch.nn.init.constant_(model.model.layers[0].self_attn.q_proj.weight, math.inf)
    with pytest.raises(ValueError, match="NaN"):
        explore(model, [ids(40)])


# -------------------------------------------------------------------------------------------------------- the grouping
GOLDEN = symmetric({(0, 1): 0.8, (0, 2): 0.3, (1, 2): 0.7, (0, 3): 0.6, (1, 3): 0.6, (2, 3): 0.9, (3, 4): 0.2}, 5)


@pytest.mark.parametrize(
    ("compare", "expected"),
    [("lead", [0, 0, 2, 2, 4]), ("prev", [0, 0, 0, 0, 4]), ("all", [0, 0, 2, 2, 4])],
)
def test_groups_by_hand(compare, expected):
    assert leads(made(GOLDEN).group(0.5, compare=compare)) == expected


def test_all_looks_at_every_member():
    chain = symmetric({(0, 1): 0.9, (0, 2): 0.9, (1, 2): 0.1}, 3)
    assert leads(made(chain).group(0.5, compare="lead")) == [0, 0, 0]
    assert leads(made(chain).group(0.5, compare="all")) == [0, 0, 2]
    assert leads(made(chain).group(0.5, compare="prev")) == [0, 0, 2]


def test_a_similarity_that_equals_the_threshold_is_enough():
    pair = symmetric({(0, 1): 0.3}, 2)  # which is not 0.3 in float32
    value = made(pair).similarity[0, 0, 1].item()
    assert leads(made(pair).group(value)) == [0, 0]
    assert leads(made(pair).group(math.nextafter(value, 1))) == [0, 1]
    assert leads(made(pair).group(0)) == [0, 0] and leads(made(pair).group(1)) == [0, 1]


def test_heads_are_grouped_by_themselves():
    both = torch.stack([symmetric({(0, 1): 0.9}, 3), symmetric({(1, 2): 0.9}, 3)])
    sharing = made(both).group(0.5)
    assert sharing.lead == ((0, 0), (0, 1), (2, 1))
    assert groups_of(sharing, 0) == [[0, 1], [2]] and groups_of(sharing, 1) == [[0], [1, 2]]


def test_groups_end_where_layers_cannot_share():
    alike = torch.ones(6, 6)
    kinds, devices = ("a", "a", "b", "b", "b", "b"), ("cuda:0",) * 4 + ("cuda:1",) * 2
    for compare in ("lead", "all", "prev"):
        assert leads(made(alike, kinds=kinds).group(0.5, compare=compare)) == [0, 0, 2, 2, 2, 2]
        assert leads(made(alike, devices=devices).group(0.5, compare=compare)) == [0, 0, 0, 0, 4, 4]
        holes, part = alike.clone(), ("a", "a", None, "a", "a", "a")
        holes[2] = holes[:, 2] = math.nan
        assert leads(made(holes, kinds=part).group(0.0, compare=compare)) == [0, 0, 2, 3, 3, 3]
        alone = made(torch.full((2, 2), math.nan), kinds=(None, None)).group(0.0, compare=compare)
        assert leads(alone) == [0, 1]


def test_settings_of_the_sharing():
    found = made(GOLDEN, region="distant", origin={"model_name": "it"})
    sharing = found.group(0.5, sinks=0, recent=3, distant_query="own", prefill="pod")
    assert (sharing.sinks, sharing.recent, sharing.distant_query, sharing.prefill) == (0, 3, "own", "pod")
    assert sharing.origin.items() >= {"model_name": "it", "region_sinks": 2, "region_recent": 6}.items()
    for threshold in (1.5, -0.1, math.nan, "0.5", True):
        with pytest.raises(ValueError, match=r"threshold=.* in \[0, 1\]; where nothing is to be shared"):
            found.group(threshold)
    with pytest.raises(ValueError, match="compare='first'"):
        found.group(0.5, compare="first")
    with pytest.raises(ValueError, match="recent=0"):
        found.group(0.5, recent=0)


@pytest.mark.parametrize("compare", ["lead", "all", "prev"])
@pytest.mark.parametrize("seed", range(4))
def test_a_saving_is_reached_with_as_little_sharing_as_any_threshold_gives(compare, seed):
    found = drawn(seed)
    every = [found.group(step / 40, compare=compare).saving(100) for step in range(41)]
    assert len(set(every)) > 4
    for target in (0.01, 0.1, 0.2, 0.3, max(every)):
        sharing = found.group_for(target, 100, compare=compare)
        assert sharing.saving(100) == min(saving for saving in every if saving >= target)
        again = found.group(sharing.origin["threshold"], compare=compare)
        assert again.lead == sharing.lead
        assert (sharing.origin["saving"], sharing.origin["at_tokens"]) == (target, 100)


def test_a_higher_threshold_may_share_more():
    """Why thresholds are not simply halved towards the target."""
    entries = {(0, 1): 0.6, (0, 2): 0.4, (1, 2): 0.9, (1, 3): 0.9, (2, 3): 0.3, (0, 3): 0.1}
    found = made(symmetric(entries, 4))
    assert leads(found.group(0.5)) == [0, 0, 2, 3] and leads(found.group(0.7)) == [0, 1, 1, 1]
    assert found.group_for(0.2, 1000).origin["threshold"] > 0.6


def test_a_saving_that_is_not_possible_is_refused_with_the_largest_that_is():
    found = made(torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match=r"at 16 tokens, where at most 0.1875 .* values are never shared, the 8 prox"):
        found.group_for(0.3, 16)
    assert found.group_for(0.1875, 16).lead == ((0, 0),) * 4
    with pytest.raises(ValueError, match="2 of the 8 pairs of layer and KV head have to lead"):
        found.group_for(0.4, 100)
    with pytest.raises(ValueError, match="at most 0.0 "):
        found.group_for(0.1, 8)
    for saving in (0, 0.5, 0.7, -1, math.nan):
        with pytest.raises(ValueError, match=f"saving={saving}.* between 0 and 0.5, since values are never shared"):
            found.group_for(saving, 100)
    with pytest.raises(ValueError, match="tokens=0"):
        found.group_for(0.1, 0)


def test_saved_and_loaded(tmp_path):
    found = explore(build("gemma3"), [ids(24)], queries=3)
    found.save(tmp_path / "new" / "folder")
    loaded = LayerSimilarity.load(tmp_path / "new" / "folder")
    for name, value in vars(found).items():
        if name != "similarity":
            assert getattr(loaded, name) == value, name
    assert torch.equal(loaded.similarity.nan_to_num(2), found.similarity.nan_to_num(2))
    assert loaded.group(0.3) == found.group(0.3)
    with pytest.raises(FileNotFoundError, match="no similarity.safetensors in .*; make one with"):
        LayerSimilarity.load(tmp_path)
    path = tmp_path / "new" / "folder" / "similarity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2"):
        LayerSimilarity.load(tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match="does not fit 3 kinds"):
        made(torch.ones(2, 2), kinds=("full",) * 3)


# --------------------------------------------------------------------------------------------------------- the samples
@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every type; each row or file of text is one document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, path = random.Random(0), tmp_path_factory.mktemp("text")
    (path / "below").mkdir()

    def document():
        return " ".join(rng.choices(VOCABULARY, k=rng.randint(20, 60)))

    (path / "a.txt").write_text(document())
    (path / "below" / "b.md").write_text(document().replace(" ", "\n"))
    (path / "c.jsonl").write_text("\n".join(json.dumps({"text": document(), "n": n}) for n in range(5)) + "\n\n")
    (path / "d.json").write_text(json.dumps([{"text": document(), "other": [n]} for n in range(4)]))
    pq.write_table(pa.table({"text": [document() for _ in range(4)], "z": [1] * 4}), path / "e.parquet")
    (path / "f.csv").write_text("left,out")
    (path / "g.json").write_text(json.dumps({"text": document()}) + "\n" + json.dumps({"text": None}))
    return path


def documents(path: Path) -> list[str]:
    if path.suffix in (".txt", ".md"):
        return [path.read_text()]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path)["text"].to_pylist()
    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    return [row["text"] for row in rows if row["text"]]


@pytest.mark.parametrize("name", ["a.txt", "below/b.md", "c.jsonl", "d.json", "e.parquet", "g.json"])
def test_files_of_every_type_are_joined_with_eos_and_packed(name, folder, tokenizer):
    expected = [token for text in documents(folder / name) for token in [*tokenizer(text)["input_ids"], 1]]
    count = len(expected) // 7
    samples = list(token_samples(folder / name, tokenizer, length=7, count=count, seed=None))
    assert all(sample.dtype == torch.int64 and sample.shape == (7,) for sample in samples)
    assert torch.cat(samples).tolist() == expected[: 7 * count]
    with pytest.raises(
        ValueError, match=rf"too short: its {len(expected)} tokens are {count} samples of 7, and {count + 1}"
    ):
        list(token_samples(folder / name, tokenizer, length=7, count=count + 1, seed=None))
    shuffled = list(token_samples(folder / name, tokenizer, length=7, count=count, seed=3))
    assert len(shuffled) == count


def test_a_folder_is_all_its_files(folder, tokenizer):
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".csv"]
    texts = [text for file in files for text in documents(file)]
    total = sum(len(text.split()) + 1 for text in texts)
    (whole,) = token_samples(folder, tokenizer, length=total, count=1, seed=None)
    assert (whole == 1).sum() == len(texts) and whole[-1] == 1
    other = [next(token_samples(folder, tokenizer, length=total, count=1, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(other[0], other[1]) and not torch.equal(other[0], other[2])
    assert torch.equal(other[0].sort().values, whole.sort().values)  # the same documents in another order


@pytest.mark.parametrize("data", ["files", PROBLEMS])
def test_samples_are_endless_and_a_run_goes_on_where_it_was(data, folder, tokenizer):
    data = folder if data == "files" else data
    length = 100 if data == PROBLEMS else 64
    options = {"length": length, "seed": 5}
    first = list(itertools.islice(token_samples(data, tokenizer, **options), 40))
    for skip in (1, 17, 39):
        assert torch.equal(next(token_samples(data, tokenizer, skip=skip, **options)), first[skip])
    some = list(token_samples(data, tokenizer, skip=2, count=3, **options))
    assert torch.equal(torch.stack(some), torch.stack(first[2:5]))
    assert len({tuple(sample.tolist()) for sample in first}) == 40  # a second pass is in another order
    other = next(token_samples(data, tokenizer, length=length, seed=6))
    assert not torch.equal(other, first[0])


def test_problems_are_those_of_the_evaluation(tokenizer):
    kinds = set()
    for sample in token_samples(PROBLEMS, tokenizer, length=400, count=20):
        assert sample.shape == (400,) and not (sample == tokenizer.unk_token_id).any()
        prompt, completion = tokenizer.decode(sample).split("<eos>")[0].rsplit(" > ", 1)
        assert split_of(f"{prompt} >") == "train" and final_answer(completion)
        assert 150 < len(prompt.split()) + len(completion.split()) + 1 < 400
        kinds.add("recall" if "recall" in prompt else "chain")
    assert kinds == {"recall", "chain"}
    (held_out,) = token_samples("problems:copy=1", tokenizer, length=80, count=1, split="test")
    assert split_of(tokenizer.decode(held_out).split(" > ")[0] + " >") == "test"


def test_a_tokenizer_with_bos_begins_every_sample_with_it(folder):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL, bos_token="<pad>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    samples = list(token_samples(folder / "c.jsonl", tokenizer, length=20, count=4, seed=None))
    assert all(sample[0] == 0 and (sample[1:] != 0).all() for sample in samples)
    plain = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    expected = torch.cat(list(token_samples(folder / "c.jsonl", plain, length=19, count=4, seed=None)))
    assert torch.equal(torch.cat([sample[1:] for sample in samples]), expected)
    assert all(sample[0] == 0 for sample in token_samples(PROBLEMS, tokenizer, length=100, count=2))


def test_samples_that_cannot_be_made_are_refused(folder, tokenizer, tmp_path, monkeypatch):
    def refused(kind, match, data=folder, **options):
        with pytest.raises(kind, match=match):
            list(token_samples(data, tokenizer, **{"length": 16, "count": 1} | options))

    refused(ValueError, "length=1 ", length=1)
    refused(ValueError, "count=0 ", count=0)
    refused(ValueError, "skip=-1 ", skip=-1)
    refused(ValueError, "seed=-1 ", seed=-1)
    refused(ValueError, "split='test' .* files", split="test")
    refused(ValueError, r"text_column='body' .* have the columns text, n", folder / "c.jsonl", text_column="body")
    refused(ValueError, r"text_column='body' .* have the columns text, z", folder / "e.parquet", text_column="body")
    refused(ValueError, "holds int", folder / "c.jsonl", text_column="n")
    refused(FileNotFoundError, "is not there", tmp_path / "nowhere.txt")
    refused(FileNotFoundError, "is not there", "./nowhere")
    refused(FileNotFoundError, "has no file of text", tmp_path)
    refused(ValueError, "too short: its 0 tokens", empty(tmp_path, "empty.jsonl", ""), count=None)
    refused(ValueError, "is not JSON", empty(tmp_path, "broken.jsonl", "{"))
    refused(ValueError, "has int where", empty(tmp_path, "numbers.json", "[1, 2]"))
    refused(ValueError, "write problems:TASK=WEIGHT", "problems:sums=1")
    refused(ValueError, "write problems:TASK=WEIGHT", "problems:trace")
    refused(ValueError, "write problems:TASK=WEIGHT", "problems:trace=0")
    refused(ValueError, "write problems:TASK=WEIGHT", "problems:")
    refused(ValueError, "length=64 .* more than 72 for 'trace'", "problems:trace=1", length=64)
    refused(ValueError, "split='validation'", "problems:copy=1", length=80, split="validation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(ImportError, r"pip install 'kara_hf\[train\]'")
    assert next(token_samples("problems:copy=1", tokenizer, length=80)).shape == (80,)
    monkeypatch.setattr(type(tokenizer), "eos_token_id", None, raising=False)
    refused(ValueError, "no EOS token")


def empty(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


# --------------------------------------------------------------------------------------------------------- the picture
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (32, 8)])
def test_pictures_are_written(layers, heads, tmp_path):
    from matplotlib.image import imread

    found = drawn(0, heads, layers)
    for suffix in ("html", "png"):
        plotting.plot(found, found.group(0.6), tmp_path / f"it.{suffix}")
    page = (tmp_path / "it.html").read_text()
    assert "Plotly.newPlot" in page and len(page) > 3_000_000  # the library is inside
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)
    assert all(f"KV head {head}: " in page for head in range(heads))
    picture = imread(tmp_path / "it.png")
    assert picture.shape[:2] == (900, 1600)
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


def test_a_picture_shows_the_groups():
    kinds = ("full", "full", None, "full", "full")
    values = GOLDEN.clone()
    values[2] = values[:, 2] = math.nan
    found = made(values, kinds=kinds, origin={"model_name": "<it>"})
    drawn_ = plotting.picture_of(found, found.group(0.5))
    assert drawn_.groups == [[[0, 1], [2], [3], [4]]] and drawn_.roles[:, 0].tolist() == [2, 1, 0, 0, 0]
    assert drawn_.name(0) == "KV head 0: 1 of 5 follow" and drawn_.low == 0.0
    assert "<it>" in drawn_.title and "2 samples of 64 tokens" in drawn_.lines[0]
    assert "20% of the (layer, KV head) pairs" in drawn_.lines[1]


def test_pictures_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    found = made(GOLDEN)
    for path, match in ((tmp_path / "it.pdf", "ends in .html or .png"), (tmp_path / "no" / "it.png", "folder that is")):
        with pytest.raises(ValueError, match=match):
            plotting.plot(found, found.group(0.5), path)
    for library, suffix in (("plotly", "html"), ("matplotlib", "png")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=rf"need {library}, .* pip install 'kara_hf\[plot\]'"):
            plotting.plot(found, found.group(0.5), tmp_path / f"it.{suffix}")


# --------------------------------------------------------------------------------------------------------- the command
def invoke(*args):
    return CliRunner().invoke(cli.app, ["pod", *map(str, args)], env={"COLUMNS": "120", "NO_COLOR": "1"})


def command(*args):
    result = invoke("explore", *args)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def refused(*args, code=2):
    result = invoke("explore", *args)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_the_command_measures_groups_and_draws_and_groups_again(tmp_path):
    out, page, picture = tmp_path / "out", tmp_path / "it.html", tmp_path / "it.png"
    output = command("--out", out, "--samples", 2, "--length", 300, "--recent", 48, "--threshold", 0, "--plot", page)
    found, sharing = LayerSimilarity.load(out), PoDSharing.from_pretrained(out)
    assert sharing.lead == ((0,) * found.heads,) * found.layers and sharing.proximal == 64
    assert found.origin["data"] == PROBLEMS and found.tokens == (300, 300)
    assert "tiny_reasoner | 2 samples of 300 tokens" in output and f"Written to {out} and {page}" in output
    assert f"0-{found.layers - 1} │ {found.layers - 1} of {found.layers}" in output
    saved = [f"{sharing.saving(64 * times):.1%}" for times in (2, 4, 8, 16)]
    assert " │ ".join(saved) in output
    assert page.stat().st_size > 3_000_000

    again = tmp_path / "again"
    output = command("--from", out, "--out", again, "--saving", 0.1, "--at-tokens", 400, "--plot", picture)
    chosen = PoDSharing.from_pretrained(again)
    assert chosen == found.group_for(0.1, 400) and f"saves {chosen.saving(400):.1%} at 400 tokens; 10.0%" in output
    assert torch.equal(LayerSimilarity.load(again).similarity, found.similarity) and picture.exists()

    output = command("--from", out, "--compare", "prev", "--recent", 20, "--distant-query", "own", "--threshold", 1)
    rewritten = PoDSharing.from_pretrained(out)
    assert rewritten == found.group(1, compare="prev", recent=20, distant_query="own")
    assert "No layer shares. The most similar neighbours reach" in output
    command("--from", out, "--saving", 0.1)
    assert PoDSharing.from_pretrained(out).origin["at_tokens"] == 8 * 64


def test_the_command_takes_a_model_and_data(tmp_path, folder):
    options = ["--model", BUNDLED_MODEL, "--samples", 2, "--length", 90, "--device", "cpu", "--dtype", "bfloat16"]
    near = ["--region", "distant", "--sinks", 2, "--recent", 40, "--queries", 8, "--seed", 3]
    command("--data", folder, "--out", tmp_path, *options, *near)
    found = LayerSimilarity.load(tmp_path)
    assert (found.region, found.sinks, found.recent, found.queries) == ("distant", 2, 40, 8)
    assert found.origin.items() >= {"data": folder.name, "seed": 3, "dtype": "bfloat16"}.items()
    assert str(folder) not in (tmp_path / "similarity.json").read_text()


def test_mistakes_end_in_one_line(tmp_path, folder, monkeypatch):
    model = ["--model", BUNDLED_MODEL]
    assert "out is missing" in refused()
    assert "threshold=1.5" in refused("--out", tmp_path, "--threshold", 1.5)
    assert "saving=0.6" in refused("--out", tmp_path, "--saving", 0.6)
    assert "given without --threshold" in refused("--out", tmp_path, "--saving", 0.2, "--threshold", 0.2)
    assert "given with --saving" in refused("--out", tmp_path, "--at-tokens", 100)
    assert "compare='first'" in refused("--out", tmp_path, "--compare", "first")
    assert "distant_query='its'" in refused("--out", tmp_path, "--distant-query", "its")
    assert "recent=0" in refused("--out", tmp_path, "--recent", 0)
    assert "region='near'" in refused("--out", tmp_path, "--region", "near")
    assert "dtype='half'" in refused("--out", tmp_path, "--dtype", "half")
    assert "samples=0" in refused("--out", tmp_path, "--samples", 0)
    assert "--data TEXT" in refused("--out", tmp_path, *model)
    assert "words of its own problems" in refused("--out", tmp_path, "--data", folder)
    assert "at most the 4096 positions" in refused("--out", tmp_path, "--length", 5000)
    assert "too short" in refused("--out", tmp_path, *model, "--data", folder / "a.txt", "--length", 100)
    assert "is not there" in refused("--out", tmp_path, *model, "--data", "./nowhere", "--length", 99, code=1)
    assert "no similarity.safetensors" in refused("--from", tmp_path, code=1)
    assert "samples, length cannot be changed with --from" in refused("--from", tmp_path, "--length", 9, "--samples", 2)
    assert "must be a file name that ends in" in refused("--out", tmp_path, "--plot", tmp_path / "it.pdf")
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert "pip install 'kara_hf[plot]'" in refused("--out", tmp_path, "--plot", tmp_path / "it.html")
    assert not list(tmp_path.iterdir())
    short = ["--samples", 1, "--length", 200, "--recent", 180]
    assert "saving=0.4 is not possible" in refused("--out", tmp_path, *short, "--saving", 0.4, "--at-tokens", 250)
    assert (tmp_path / "similarity.json").exists()  # what was measured is not lost


def test_help_needs_no_torch():
    code = (
        "import sys; from kara_hf.cli.app import app; import contextlib\n"
        "with contextlib.suppress(SystemExit): app(['pod', 'explore', '--help'])\n"
        "print('loaded:', {'torch', 'transformers', 'numpy', 'datasets', 'plotly', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT / "src")
    assert "--from DIR" in result.stdout and "loaded: set()" in result.stdout
