"""Other packages beside this one: prompts of one length, what is graded, and what a worker says of a cache."""

import contextlib
import subprocess

import pytest
import torch

from benchmarks.common.models import TINY
from benchmarks.peers import packages, worker
from benchmarks.quality.kit import evaluator_of, tasks_of

JOB = {"model": str(TINY), "new": 12, "kept": 80, "window": 8, "interval": 16}


@pytest.fixture(scope="module")
def asked():
    evaluator = evaluator_of(device="cpu")
    (task,) = tasks_of("recall:length=160", evaluator.tokenizer)
    return packages.Asked(evaluator, task, 2)


@pytest.fixture(scope="module")
def full(asked):
    return worker.measured(JOB | {"ids": asked.ids, "method": worker.FULL})


def test_prompts_have_one_length_and_their_answers(asked, full):
    assert {len(row) for row in asked.ids} == {asked.length}
    assert asked.right(full["tokens"]) == 2 and asked.right([[5] * 12, [5] * 12]) == 0


def test_a_prompt_is_not_cut_where_its_answer_stands(asked):
    class Late(packages.Asked):
        def __init__(self):
            vars(self).update(vars(asked))
            self.length = 20

    prompt = asked.evaluator.prompt(tasks_of("recall:length=160", asked.evaluator.tokenizer)[0], 0)
    answer = asked.evaluator.tokenizer.decode(prompt.ids[30:32])
    prompt.example.__dict__["answers"] = (answer,)
    with pytest.raises(ValueError, match="cannot be cut to 20 tokens without its answer"):
        Late()._cut(prompt)


@pytest.mark.parametrize("method", [name for name in packages.METHODS if packages.peer_of(name) == packages.OURS][1:])
def test_every_cache_decodes(asked, full, method, request):
    if "quanto" in method:
        request.getfixturevalue("quanto")
    row = worker.measured(JOB | {"ids": asked.ids, "method": method})
    assert [len(tokens) for tokens in row["tokens"]] == [12, 12]
    assert row["process_bytes"] > 10 * full["held_bytes"] and row["held_bytes"] > 0
    if method != worker.KARA:  # less than a window and its recent tokens, so nothing is dropped, and queries are held
        assert row["held_bytes"] < full["held_bytes"]
    if "all tokens" in method or "quanto" in method:
        assert row["tokens"] == full["tokens"]


def test_how_long_tokens_agree():
    assert packages.agreed([[1, 2, 3], [1, 2, 3]], [[1, 2, 4], [1, 2, 3]]) == 2.5
    assert packages.agreed([[1, 2]], [[0, 2]]) == 0


def test_rows_stand_beside_the_full_cache_of_their_own_package(asked, full, monkeypatch):
    steps = {"kvpress DynamicCache": 4.0, "kvpress SnapKV, then Knorm": 2.0}

    def run_worker(python, folder, job, command):
        yield full | {"step_ms": steps[job["method"]]}

    monkeypatch.setattr(packages, "run_worker", run_worker)
    rows = packages.measured(asked, None, list(steps), JOB | {"ids": asked.ids})
    assert [row["speedup"] for row in rows] == [1.0, 2.0]
    assert all(row["found"] == 2 and row["agreed"] == 12 and row["tokens"] == asked.length for row in rows)
    shape = {"case": "peers", "prompt": 160, "batch": 2}
    mine = [shape | {"method": worker.KV, "speedup": 1.5}]
    failed = [shape | {"status": "failed"}, {"case": "serving"}]
    (aim,) = packages.speed_aims([shape | row for row in rows] + mine + failed)
    assert aim.verdict == "missed" and aim.detail == "0.75 at 160 tokens, batch 2"


def test_a_cache_that_fails_leaves_the_rows_of_others(asked, full, monkeypatch):
    def run_worker(python, folder, job, command):
        if job["method"] == "OpenVINO":
            raise subprocess.CalledProcessError(3, command)
        yield full

    monkeypatch.setattr(packages, "run_worker", run_worker)
    failed, alone = packages.measured(
        asked, None, ["OpenVINO", "OpenVINO H2O"], JOB | {"gguf": "file", "ids": asked.ids}
    )
    assert failed["status"] == "failed" and "ended with 3" in failed["reason"]
    assert alone["found"] == 2 and "speedup" not in alone
    beside, skipped = packages.measured(asked, None, ["randkv DynamicCache", "randkv"], JOB | {"ids": asked.ids})
    assert beside["speedup"] == 1 and skipped["status"] == "skipped" and "one sequence" in skipped["reason"]


def test_openvino_needs_a_file(asked):
    with pytest.raises(packages.Skip, match="--set gguf=FILE"):
        packages.measured(asked, None, ["OpenVINO"], JOB | {"gguf": ""})


def test_what_is_entered_around_a_prompt_and_behind_it(asked):
    events = []

    @contextlib.contextmanager
    def entered(name):
        events.append(name)
        yield
        events.append(f"{name} left")

    class Model:
        def forward(self, past_key_values=None):
            pass

        def __call__(self, input_ids, position_ids, **given):
            events.append(position_ids[0].tolist())
            assert set(given) == {"use_cache", "logits_to_keep", "past_key_values"}
            return type("Out", (), {"logits": torch.eye(5)[None, 3:4].expand(len(input_ids), -1, -1)})

    cut = worker.Cut(None, lambda: 7, entered("reading"), entered("decoding"))
    found = worker.decode(Model(), cut, torch.zeros(1, 3, dtype=torch.long), 3)
    assert events == ["reading", [0, 1, 2], "reading left", "decoding", [3], [4], "decoding left"]
    assert found.tokens == [[3, 3, 3]] and found.held == 7 and len(found.steps) == 2
