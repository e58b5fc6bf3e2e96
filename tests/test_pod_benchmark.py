"""The benchmark of PoD runs from exploration to tables, and its numbers are those in the documentation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from kara_hf import PoDSharing

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pod(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pod

    return pod


def run(pod, *arguments) -> str:
    result = CliRunner().invoke(pod.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_from_exploration_to_tables(pod, tmp_path, monkeypatch):
    monkeypatch.setattr(pod, "TOKENS", 160)
    monkeypatch.setattr(pod, "MAPS", {"25": {"saving": 0.25, "recent": 16}})
    monkeypatch.setattr(pod, "LENGTHS", (96, 128))
    monkeypatch.setattr(pod, "CASES", {"trace": {"generated": 48}, "recall": {"length": 96}})
    maps, adapted, out = tmp_path / "maps", tmp_path / "adapted", tmp_path / "rows.json"
    run(pod, "explore", "--samples", 4, "--out", maps)
    assert (maps / "25" / "similarity.png").exists()
    sharing = PoDSharing.from_pretrained(maps / "25")
    assert sharing.saving(160) >= 0.25 and sharing.proximal == 20
    run(pod, "adapt", "--map", 25, "--steps", 2, "--batch", 2, "--maps", maps, "--out", adapted)
    told = run(pod, "measure", "--n", 2, "--batch", 2, "--maps", maps, "--adapted", adapted, "--out", out)
    assert "PoD 25, full" in told and "run `adapt` first" in told
    rows = pod.load_rows(out)
    by_name = {(row["method"], row["task"]): row for row in rows}
    full = by_name["full cache", "trace"]
    assert full["accuracy"] == 1 and full["loss"] < 0.1
    shared = by_name["PoD 25, lora", "trace"]
    assert shared["resident_bytes"] < 0.95 * full["full_bytes"] and shared["loss"] is not None
    assert by_name["quantized, 4 bits", "trace"]["resident_bytes"] < 0.8 * full["full_bytes"]
    before = out.read_text()
    run(pod, "measure", "--n", 2, "--batch", 2, "--maps", maps, "--adapted", adapted, "--out", out)
    assert out.read_text() == before  # what is there is not measured again
    table = pod.markdown(rows, pod.digest(pod.MODEL))
    assert "| PoD 25, lora |" in table and "| KV-Compress 25 |" in table


def test_speed_is_measured(pod, tmp_path):
    out = tmp_path / "speed.json"
    told = run(pod, "speed", "--seen", "64,96", "--steps", 2, "--out", out)
    assert "pairs that differ by head" in told
    assert "| layers in fours |" in pod.speed_markdown(pod.load_rows(out))
    for sharing in pod.maps_of(8, 4, 64).values():
        assert sharing.heads == 4


def test_the_documentation_has_the_measured_numbers(pod):
    shown = (ROOT / "docs" / "pod.md").read_text()
    assert pod.speed_markdown(pod.load_rows(ROOT / "benchmarks" / "results" / "pod_speed.json")) in shown
    assert pod.markdown(pod.load_rows(pod.RESULTS), pod.digest(pod.MODEL)) in shown


def test_the_similarity_in_the_repository_is_that_of_the_bundled_model(pod):
    similarity = load_file(pod.FOLDER / "similarity.safetensors")["similarity"]
    assert similarity.shape == (2, 12, 12) and torch.equal(similarity, similarity.transpose(1, 2))
    for name, settings in pod.MAPS.items():
        sharing = PoDSharing.from_pretrained(pod.FOLDER / name)
        assert settings["saving"] <= sharing.saving(pod.TOKENS) < settings["saving"] + 0.02
