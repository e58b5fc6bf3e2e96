"""Recordings agree with the cache at every step."""

import json
import time
from contextlib import contextmanager

import pytest
import torch
from support.architectures import build as build_model
from support.demo import DEEP, finished, make
from support.marks import few, slow
from support.tokenizing import tokenizer

from kara_hf.demo.models import Models
from kara_hf.demo.presets import ASKED, CONVERSATION, FULL, KARA, NEEDLE, RANDOM, STORY, TABLE
from kara_hf.demo.recorder import CacheRecorder
from kara_hf.demo.recording import Recording, rounded, runs_of, spread


@contextmanager
def watching():
    """What caches themselves say after every step, by recording: tokens seen, what rows hold, and the report."""
    seen = {}
    step = CacheRecorder.step

    def watch(self, text, seconds):
        step(self, text, seconds)
        cache = self.cache
        if cache is not None:
            rows = self.recording.rows
            seen.setdefault(id(self.recording), []).append(
                (
                    int(cache.report().seen[0]),
                    [cache.kept_positions(layer, 0, head).tolist() for layer, head in rows],
                    [cache.chunks(layer, 0, head) for layer, head in rows],
                    cache.report(),
                )
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheRecorder, "step", watch)
        yield seen


def agree(recording, steps):
    """What a recording says of every step is what the cache said itself."""
    samples = {sample[0]: sample[1:] for sample in recording.samples}
    assert max(samples) == recording.seen and len(steps) == (len(recording.tokens) if steps else 0)
    for seen, positions, chunks, report in steps:
        for row, (layer, head) in enumerate(recording.rows):
            assert recording.kept_positions(row, seen).tolist() == positions[row]
            assert recording.chunks(row, seen) == chunks[row]
            assert len(positions[row]) == report.kept[report.layers.index(layer), 0, head]
        if seen in samples:
            held = report.nominal_bytes, report.resident_bytes, report.peak_bytes, report.full_bytes
            assert samples[seen] == [number + report.other_bytes for number in held]


CASES = {
    "kara": {},
    "kara on its prompt": {"settings": {"compress_prompt": True, "anchor_share": 0.5, "recent": 0}},
    "kara, no queries": {"settings": {"score": "key-difference"}},
    "random control": {"choice": RANDOM},
    "kv-compress": {"choice": ASKED, "settings": {"retention": 0.3}},
    "kv-compress, as it comes": {"choice": "KV-Compress", "settings": {"retention": 0.3}},
    "kv-compress on a needle": {"choice": ASKED, "task": NEEDLE, "length": 200, "settings": {"retention": 0.2}},
    "kv-compress, recency": {"choice": "KV-Compress", "settings": {"metric": "recency"}},
    "pod": {"choice": "PoD", "model": DEEP, "length": 72},
    "kara and pod": {"choice": "Kara + PoD", "model": DEEP, "length": 72},
    "kv-compress and pod": {"choice": "KV-Compress + PoD", "model": DEEP, "length": 72},
    "kara, pinned": {"settings": {"pin": "8:20, 60:75", "compress_prompt": True}},
    "kv-compress, pinned": {"choice": ASKED, "settings": {"pin": "8:20, 60:75", "retention": 0.3}},
    "full": {"choice": FULL},
}


SCORED = ["kara", "kara and pod", "kv-compress", "kv-compress and pod"]


@pytest.fixture(scope="module")
def recorded(models):
    """The run of a case, made once, and what its cache said at every step."""
    made = {}

    def get(case):
        if case not in made:
            with watching() as seen:
                (run,) = finished(make(models, **CASES[case])).runs
            made[case] = run, seen.get(id(run.recording), [])
        return made[case]

    return get


@pytest.mark.parametrize("case", few(list(CASES), "kara on its prompt", *SCORED, "full"))
def test_what_is_derived_is_what_the_cache_held_at_every_step(recorded, case):
    run, steps = recorded(case)
    recording = Recording.from_dict(json.loads(json.dumps(run.recording.to_dict())))
    assert recording == run.recording
    assert recording.end["reason"] in ("end", "limit"), recording.end
    assert recording.seen == recording.prompt + len(recording.tokens) - 1
    assert len(recording.micros) == len(recording.tokens) and min(recording.micros) > 0
    assert bool(steps) == (case != "full")
    agree(recording, steps)
    evicting = case not in ("full", "pod")
    assert bool(recording.changes) == evicting
    if evicting:
        lengths = {len(row) for row in steps[-1][1]}
        assert max(lengths) < recording.seen
        assert (len(lengths) > 1) == (CASES[case].get("choice") in (ASKED, "KV-Compress + PoD"))


@pytest.mark.parametrize(
    "name, choice",
    [("gemma3", KARA), ("deepseek-v3", KARA)]
    + [slow(*other) for other in (("gemma3", "KV-Compress"), ("gpt-oss", KARA), ("gemma3", FULL))],
)
def test_any_model_and_its_own_words(tmp_path, name, choice):
    """Layers of other kinds, a latent row for all heads, and a tokenizer of English."""
    words = tokenizer("bpe")
    model = build_model(name)
    model.resize_token_embeddings(len(words))
    model.save_pretrained(tmp_path / name)
    words.save_pretrained(tmp_path / name)
    models = Models([str(tmp_path / name)], device="cpu")
    with watching() as seen:
        session = finished(make(models, model=name, task=NEEDLE, length=200, new=60, choice=choice))
    recording = session.runs[0].recording
    assert recording.end["reason"] == "limit" and recording.end["score"] == 0, recording.end
    full_attention = {
        i for i, kind in enumerate(getattr(model.config, "layer_types", None) or ()) if kind == "full_attention"
    }
    assert {layer for layer, _ in recording.rows} == (full_attention or set(range(model.config.num_hidden_layers)))
    agree(recording, seen.get(id(session.runs[0].recording), []))
    assert bool(recording.changes) == (choice != FULL)
    assert "".join(session.to_dict()["prompt"]) == words.decode(session.runs[0].generation.ids[0])
    for task in (STORY, CONVERSATION, TABLE):
        (own,) = make(models, model=name, task=task, length=480, choice=choice).runs
        assert own.generation.example.question and 380 < own.generation.ids.shape[1] < 500
    with pytest.raises(ValueError, match="PoD needs a map"):
        make(models, model=name, task=NEEDLE, length=200, choice="PoD")


@pytest.mark.parametrize("case", SCORED)
def test_evicted_tokens_have_the_score_they_were_judged_by(recorded, case):
    recording = recorded(case)[0].recording
    for row in range(len(recording.rows)):
        scores = {}
        for change in recording.changes:
            scored = spread(change["scored"][row]).tolist()
            assert len(scored) == len(change["scores"][row])
            new = dict(zip(scored, change["scores"][row], strict=True))
            dropped = spread(change["dropped"][row]).tolist()
            assert set(dropped) <= set(new)
            if case.startswith("kara") and dropped:  # with top-k nothing that stays scores less than what goes
                stay = [score for position, score in new.items() if position not in dropped]
                assert max(new[position] for position in dropped) <= min(stay) * 1.01
            scores |= new
        kept = recording.kept_positions(row, recording.seen).tolist()
        if case.startswith("kv"):
            assert set(kept) - set(scores) <= set(range(recording.seen - 8, recording.seen))


def test_runs_and_scores_are_written_short():
    positions = torch.tensor([0, 1, 2, 7, 9, 10]).numpy()
    assert runs_of(positions) == [0, 3, 7, 1, 9, 2] and spread(runs_of(positions)).tolist() == positions.tolist()
    assert runs_of(positions[:0]) == [] and spread([]).tolist() == []
    assert rounded([0.0123456, 123456.0, 0.0, -0.5, float("inf")])[:4] == [0.0123, 123000.0, 0.0, -0.5]
    json.dumps(rounded([float("nan"), float("inf")]), allow_nan=False)


def test_a_reader_that_comes_again_gets_what_is_new(models):
    session = make(models, beside=True, paused=True)
    session.start()
    have, parts = [], []
    for allowed in (3, 20, None):
        session.control.allow(allowed)
        for _ in range(2000):
            if session.done or (allowed and all(len(run.recording.tokens) == allowed for run in session.runs)):
                break
            time.sleep(0.01)
        part = json.loads(json.dumps(session.since(have)))
        parts.append(part)
        have = [
            {name: sum(len(p["runs"][i][name]) for p in parts) for name in ("tokens", "micros", "changes", "samples")}
            for i in range(2)
        ]
    assert "prompt" in parts[0] and "prompt" not in parts[1] and parts[1]["paused"] and parts[2]["done"]
    assert len(parts[1]["runs"][0]["tokens"]) == 17
    for i, run in enumerate(session.runs):
        for name in ("tokens", "micros", "changes", "samples"):
            assert [entry for part in parts for entry in part["runs"][i][name]] == getattr(run.recording, name)
    assert "".join(parts[0]["prompt"]) == session.runs[0].loaded.tokenizer.decode(session.runs[0].generation.ids[0])
