"""Divergence from the full cache: what is read is what decoding does, in bounded memory, and nothing is read twice."""

import numpy as np
import pytest
import torch
from support.architectures import build
from support.sharing import deep
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from kara_hf import KaraCache, KVCompressCache
from kara_hf.evaluation import Document, divergence, load_divergence
from kara_hf.evaluation.measure import divergence as module
from kara_hf.evaluation.measure.diverged import EQUAL
from kara_hf.evaluation.measure.equal_bytes import ShareCurve
from kara_hf.evaluation.measure.forced import read_together
from kara_hf.evaluation.measure.memory import held_bytes
from kara_hf.integration.attach import is_attached
from kara_hf.methods.registry import SharedSettings

PROMPT = 20
SHARED = SharedSettings(window=16, recent=4, block_size=4, sinks=2, observation=4)
MAKERS = {
    "kara": lambda model: KaraCache(model, window=16, recent=4, block_size=4, retention=0.25),
    "kv-compress": lambda model: KVCompressCache(
        model, retention=0.3, block_size=4, protected=4, sinks=PROMPT, observation=4
    ),
}


@pytest.fixture(scope="module")
def model():
    return deep()


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(1)
    return [Document(torch.randint(1, 50, (60,), generator=generator).tolist(), PROMPT) for _ in range(3)]


@torch.no_grad()
def decoded(model, document, cache):
    """Log-probabilities behind each forced token, which comes alone, ``[N, V]``, and bytes held there."""
    model(torch.tensor([document.ids[:PROMPT]]), past_key_values=cache, use_cache=True)
    logits, held = [], []
    for token in document.ids[PROMPT:-1]:
        logits.append(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1])
        held.append(held_bytes(cache))
    return torch.stack(logits).double().log_softmax(-1), held


@pytest.mark.parametrize("name", MAKERS)
def test_a_reading_is_that_of_decoding(model, documents, name):
    full, cache = DynamicCache(config=model.config), MAKERS[name](model)
    (expected, whole), (found, held) = (decoded(model, documents[0], each) for each in (full, cache))
    kl = (expected.exp() * (expected - found)).sum(-1).numpy()
    following = torch.tensor(documents[0].ids[PROMPT + 1 :])[:, None]
    for step, batch in ((1, 1), (16, 3)):
        ((reading, *others),) = read_together(model, documents[:batch], [lambda: MAKERS[name](model)], step=step)
        np.testing.assert_allclose(reading.kl, kl, atol=2e-5, rtol=1e-3)
        np.testing.assert_allclose(reading.loss, -found.gather(1, following)[:, 0], atol=1e-4)
        np.testing.assert_allclose(reading.full_loss, -expected.gather(1, following)[:, 0], atol=1e-4)
        assert (reading.same == (expected.argmax(-1) == found.argmax(-1)).numpy()).all()
        assert reading.full_bytes == max(whole) == held_bytes(full) and reading.seconds > 0
        assert (reading.resident_bytes, reading.end_bytes) == (max(held), held[-1])
        assert all((other.kl != reading.kl).any() for other in others)
    assert kl.max() > 0.01


def test_the_full_cache_does_not_diverge_beside_others(model, documents):
    """A cache that is made later than one that detaches the model is answered for all the same."""
    makers = [lambda: DynamicCache(config=model.config), lambda: MAKERS["kara"](model)]
    makers.append(lambda: module.make_method("full").make(model, None))
    same, other, full = (found for (found,) in read_together(model, documents[:1], makers, step=16))
    assert same.kl.max() == full.kl.max() == 0 and same.same.all() and (same.loss == same.full_loss).all()
    assert other.kl.max() > 0.01
    assert not is_attached(model)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.most = max(self.most, leaf.numel())
        return found


def test_memory_does_not_grow_with_the_document_times_the_vocabulary():
    words, length, step = 20_000, 160, 8
    model = deep(vocab_size=words)
    document = Document(torch.randint(1, 50, (length,)).tolist(), PROMPT)
    with Largest() as largest:
        read_together(model, [document], [lambda: MAKERS["kara"](model)], step=step)
    weights = max(parameter.numel() for parameter in model.parameters())
    assert step * words <= largest.most <= max(weights, step * words) < (length - PROMPT) * words / 2


# ------------------------------------------------------------------------------------------------------------- the runs
def run(model, documents, out, methods=("random", "kv-compress-random"), budgets=(0.7,), **settings):
    settings = {"shared": SHARED, "step": 16, "batch": 2, "weights": "w", "name": "tiny"} | settings
    return divergence(model, documents, methods, budgets, out=out, **settings)


def test_a_stopped_run_goes_on_where_it_was(model, documents, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    read, left = module.read_together, [3]

    def stopping(*args, **settings):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return read(*args, **settings)

    monkeypatch.setattr(module, "read_together", stopping)
    with pytest.raises(Stop):
        run(model, documents, tmp_path, equal="tokens", together=1)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.divergence")}
    assert len(load_divergence(tmp_path)) == 5  # of the batch of one document only one cell
    left[0] = 100
    whole = run(model, documents, tmp_path, equal="tokens", together=1)
    assert left[0] == 99 and all(path.read_bytes() == text for path, text in first.items() if text.count(b"\n") == 4)
    assert sorted(zip(whole.method, whole.number, strict=True)) == [
        (name, number) for name in ("kv-compress-random", "random") for number in range(3)
    ]
    left[0] = 0
    again = run(model, documents, tmp_path, equal="tokens", together=1)
    assert again.drop(columns=["settings", "provenance"]).equals(whole.drop(columns=["settings", "provenance"]))
    monkeypatch.undo()
    alone = run(model, documents, tmp_path / "alone", equal="tokens")
    assert np.allclose(alone.kl_mean, whole.kl_mean, rtol=1e-3)
    with pytest.raises(ValueError, match="holds another document 1"):
        run(model, [documents[0], documents[2]], tmp_path, equal="tokens")
    with pytest.raises(ValueError, match="another setting .*window"):
        run(model, documents, tmp_path, equal="tokens", shared=SharedSettings(window=32, block_size=4))


def test_lines_are_statistics_of_the_tokens(model, documents, tmp_path):
    frame = run(model, documents, tmp_path, ("full", "recency"), rules=("prompt-kept", "query-aware"), equal="tokens")
    assert sorted(set(frame.rule)) == ["none", "prompt-kept", "query-aware"]
    for row in frame.to_dict("records"):
        with np.load(row["arrays"]) as found:
            kl = found["kl"]
            assert kl.dtype == np.float32 and len(kl) == row["tokens"] == 39
            told = [row[name] for name in ("kl_mean", "kl_median", "kl_99", "kl_max")]
            np.testing.assert_allclose(told, [kl.mean(), np.median(kl), np.quantile(kl, 0.99), kl.max()], rtol=1e-5)
            assert row["same"] == found["same"].mean()
            losses = [found["loss"].mean(), found["full_loss"].mean()]
            np.testing.assert_allclose([row["loss"], row["full_loss"]], losses, rtol=1e-5)
        assert (row["kl_max"] == 0) == (row["method"] == "full")
    kept = frame[frame.method == "recency"].groupby("rule").resident_bytes.mean()
    assert kept["query-aware"] < kept["prompt-kept"]


def test_methods_hold_the_budget_of_bytes(tmp_path):
    model, shared = build("llama"), SharedSettings(window=64, recent=16, block_size=8, sinks=2, observation=4)
    text = [Document(torch.randint(1, 50, (250,)).tolist(), PROMPT)]
    names, done = ("random", "kara", "kv-compress-random"), []
    settings = {"step": 64, "shared": shared, "progress": lambda label, part: done.append(part)}
    frame = run(model, text, tmp_path, names, (0.8, 0.02), **settings)
    assert sum(done) == pytest.approx(3 * 2)
    frame["held"] = frame.resident_bytes / frame.full_bytes
    frame["share"] = [settings["share"] for settings in frame.settings]
    for (name, budget), cell in frame.groupby(["method", "budget"]):
        if budget < 0.1:  # nobody can hold so little: the budget's share of tokens is kept
            assert (cell.share == budget).all() and (cell.held > 2 * budget).all(), name
        else:
            assert (abs(cell.held / budget - 1) < EQUAL).all(), (name, budget, cell.held.tolist())
    kara, free = (frame[(frame.method == name) & (frame.budget == 0.8)].share.iloc[0] for name in ("kara", "random"))
    assert kara < free  # which pays for its queries


def test_a_share_is_found_on_a_line_in_two_trials():
    curve, tried = ShareCurve(window=100), []

    def held(share):
        return 0.2 + 0.9 * share

    share = 0.5
    while share is not None:
        tried.append(share)
        curve.add(share, held(share))
        share = curve.next_share(0.5, tried)
    assert len(tried) <= 3 and held(curve.best(0.5, tried)) == pytest.approx(0.5, rel=0.01)
    assert curve.next_share(0.25, [0.5]) == pytest.approx(0.05 / 0.9, rel=0.05)  # from what was learned
    assert curve.next_share(0.1, [0.5]) is None and curve.best(0.1, [0.5]) == 0.1
    flat = ShareCurve(window=100)
    flat.add(0.5, 0.7)
    flat.add(0.4, 0.7)
    assert flat.next_share(0.4, [0.4]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": []}, "documents=.* at least one"),
        (
            {"documents": [Document([1, 2, 70_000], 1)]},
            "document 0 has the token 70000, and the model's vocabulary goes",
        ),
        ({"documents": [Document([1] * 70_000, 1)]}, "document 0 has 70000 tokens, and the model has .* positions"),
        ({"methods": ("nothing",)}, "method='nothing' is not possible"),
        ({"methods": ()}, "the name of at least one"),
        ({"methods": ("pod",)}, "method 'pod' needs a sharing map"),
        ({"budgets": (1.5,)}, r"budgets=1.5 is not possible: budgets must be shares in \(0, 1\]"),
        ({"rules": ("query-agnostic",)}, "rules='query-agnostic' is not possible"),
        ({"step": 0}, "step=0 is not possible"),
        ({"batch": 0}, "batch=0 is not possible"),
    ],
)
def test_what_is_not_possible_is_said(model, documents, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, **{"documents": documents, "out": tmp_path, **change})
    assert not list(tmp_path.iterdir())


def test_a_document_has_something_behind_its_prompt():
    for prompt in (0, 3):
        with pytest.raises(ValueError, match=f"prompt={prompt} is not possible: prompt must be from 1 to 2"):
            Document([1, 2, 3, 4], prompt)
