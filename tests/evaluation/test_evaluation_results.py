"""Files of results: what is appended is there whatever happens next, and what is packed reads as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from support.marks import most_examples

from kara_hf.evaluation.measure.provenance import provenance
from kara_hf.evaluation.measure.results import EXAMPLE, Cell, CellFile, load, pack, save_packed
from kara_hf.methods.rules import OLD_SPELLINGS

CELL = Cell("org/tiny model", "3f9a", "trace:generated=300", "prompt-kept", "random", 0.25, "bytes", 0)
SETTINGS = {"window": 64, "sizes": [1, 2]}
PROVENANCE = {"command": "kara-hf evaluate", "date": "2026-11-24"}


def example(number: int, **changes) -> dict:
    line = {
        "number": number,
        "score": 1.0,
        "generated": 310,
        "truncated": False,
        "looped": False,
        "distance": None,
        "prompt": 190,
        "mean_bytes": 1000.5,
        "resident_bytes": 2000,
        "peak_bytes": 3000,
        "allocated_bytes": None,
        "full_bytes": 8000,
        "seconds": 0.25,
        "text": "ans \u2028 x",
    }
    return line | changes


def opened(folder, process=0, *, cell=CELL, **changes) -> CellFile:
    return CellFile(folder, cell, SETTINGS | changes, PROVENANCE, process)


def test_a_run_goes_on_where_it_was(tmp_path):
    first = opened(tmp_path)
    assert first.done == set()
    first.append([example(0), example(2)])
    opened(tmp_path, 1).append([example(1)])
    again = opened(tmp_path)
    assert again.done == {0, 1, 2}
    again.append([example(3)])
    relative = "org_tiny_model/trace_generated=300/prompt-kept/random@0.25-seed0.0.jsonl"
    assert first.path == again.path == tmp_path / relative
    assert len(first.path.read_text().splitlines()) == 4
    frame = load(tmp_path)
    assert frame["number"].tolist() == [0, 1, 2, 3]
    assert frame["task"].unique().tolist() == ["trace:generated=300"]
    assert frame["text"][0] == "ans \u2028 x"
    assert frame["distance"].isna().all()


@pytest.mark.parametrize("torn", ['{"number": 2, "sco', '{"number": 2}\x00\x00', "\x00\x00\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    file = opened(tmp_path)
    file.append([example(0), example(1)])
    with file.path.open("a") as raw:
        raw.write(torn)
    assert load(tmp_path)["number"].tolist() == [0, 1]
    again = opened(tmp_path)
    assert again.done == {0, 1}
    again.append([example(2)])
    assert load(tmp_path)["number"].tolist() == [0, 1, 2]


def test_a_torn_header_is_written_again(tmp_path):
    path = opened(tmp_path).path
    whole = path.read_text()
    path.write_text(whole[:40])
    assert opened(tmp_path).done == set()
    assert path.read_text() == whole


def test_a_torn_line_of_another_process_is_left_to_it(tmp_path):
    path = opened(tmp_path, 1).path
    with path.open("a") as raw:
        raw.write('{"numb')
    opened(tmp_path, 0)
    assert path.read_text().endswith('{"numb')


def test_other_settings_are_refused(tmp_path):
    path = opened(tmp_path).path
    with pytest.raises(ValueError, match="settings window: 64 there, 128 now.*choose another folder, or remove"):
        opened(tmp_path, window=128)
    with pytest.raises(ValueError, match="window"):
        opened(tmp_path, 1, window=128)
    with pytest.raises(ValueError, match="cell weights: '3f9a' there, 'ffff' now"):
        opened(tmp_path, cell=replace(CELL, weights="ffff"))
    assert not path.with_name(path.name.replace(".0.", ".1.")).exists()
    opened(tmp_path, cell=replace(CELL, seed=1), window=128)
    opened(tmp_path, cell=replace(CELL, equal="tokens"), window=128)
    opened(tmp_path, sizes=(1, 2))  # as JSON has it


def test_names_are_safe_for_files(tmp_path):
    cell = replace(CELL, model="../../up", task="x" * 300, method="a/b\\c:d*?", rule="..")
    path = opened(tmp_path, cell=cell).path
    assert path.resolve().is_relative_to(tmp_path.resolve())
    assert max(map(len, path.relative_to(tmp_path).parts)) <= 140
    longer = replace(CELL, task="x" * 301)
    assert opened(tmp_path, cell=longer).path.parent.parent != path.parent.parent


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"score": float("nan")}, "JSON"),
        ({"score": "1"}, "score='1' is of the wrong kind: it must be float"),
        ({"truncated": 0}, "truncated=0 is of the wrong kind: it must be bool"),
        ({"number": True}, "number=True"),
        ({"extra": 1}, "not those of an example"),
    ],
)
def test_wrong_examples_are_refused(tmp_path, changes, message):
    file = opened(tmp_path)
    with pytest.raises(ValueError, match=message):
        file.append([example(0) | changes])
    assert file.done == set()


@pytest.mark.parametrize("damage", ["{oops\n", "[]\n", '{"number": 1}\n', json.dumps(example(0, score=None)) + "\n"])
def test_damage_is_told_by_file_and_line(tmp_path, damage):
    file = opened(tmp_path)
    file.append([example(0)])
    with file.path.open("a") as raw:
        raw.write(damage)
    file.path.write_text(file.path.read_text() + json.dumps(example(2)) + "\n")
    for read in (load, opened):
        with pytest.raises(ValueError, match=r"seed0\.0\.jsonl, line 3 is damaged"):
            read(tmp_path)


def test_what_several_files_hold_counts_once(tmp_path):
    opened(tmp_path, 0).append([example(0, score=1.0), example(1)])
    opened(tmp_path, 1).append([example(0, score=1.0), example(2)])
    assert load(tmp_path)["number"].tolist() == [0, 1, 2]
    other = opened(tmp_path, cell=replace(CELL, seed=1))
    other.append([example(0)])
    assert len(load(tmp_path)) == 4
    assert len(load(other.path)) == 1


def test_files_of_one_cell_that_do_not_belong_together(tmp_path):
    opened(tmp_path / "a").append([example(0)])
    opened(tmp_path / "b", window=128).append([example(1)])
    with pytest.raises(ValueError, match="different settings for .*random"):
        load(tmp_path)


def test_nothing_there(tmp_path):
    opened(tmp_path)
    with pytest.raises(ValueError, match="no results in .*kara-hf evaluate"):
        load(tmp_path)
    with pytest.raises(OSError):
        load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "text, message",
    [("{", "is not JSON"), ("{}", "no list"), ("[]", "no results"), ('[{"cell": 1}]', "row 0 is no row")],
)
def test_packed_files_that_are_none(tmp_path, text, message):
    path = tmp_path / "packed.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_results_without_what_the_allocator_gave_out(tmp_path):
    """As they were written before it was noted."""
    file = opened(tmp_path)
    file.append([example(0), example(1)])
    file.path.write_text(file.path.read_text().replace('"allocated_bytes": null, ', ""))
    frame = load(tmp_path)
    assert frame["allocated_bytes"].isna().all() and len(frame) == 2
    save_packed(frame, tmp_path / "packed.json")
    rows = json.loads((tmp_path / "packed.json").read_text())
    del rows[0]["examples"]["allocated_bytes"]
    (tmp_path / "packed.json").write_text(json.dumps(rows))
    pd.testing.assert_frame_equal(load(tmp_path / "packed.json"), frame.drop(columns="text"))


values = {int: st.integers(0, 10**12), bool: st.booleans(), float: st.floats(0, 1e9)}
examples = st.fixed_dictionaries(
    {name: values[kind] for name, kind in EXAMPLE.items()}
    | {name: st.none() | st.floats(0, 1e6) for name in ("distance", "allocated_bytes")}
    | {"text": st.text(), "seconds": st.floats(0.001, 1000)}
)
cells = st.builds(
    Cell,
    model=st.text(min_size=1, max_size=8),
    weights=st.just("3f9a"),
    task=st.sampled_from(["trace", "niah:length=64"]),
    rule=st.sampled_from(["prompt-kept", "none"]),
    method=st.sampled_from(["full", "random", "kara"]),
    budget=st.floats(0.01, 1),
    equal=st.sampled_from(["bytes", "tokens"]),
    seed=st.integers(0, 3),
)


@most_examples(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.dictionaries(
        cells, st.lists(examples, min_size=1, max_size=4, unique_by=lambda line: line["number"]), min_size=1, max_size=3
    )
)
def test_packed_results_read_as_they_were(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("results")
    for i, (cell, lines) in enumerate(parts.items()):
        CellFile(folder / str(i), cell, SETTINGS, PROVENANCE | {"part": i}).append(lines)
    frame = load(folder)
    assert len(frame) == sum(map(len, parts.values()))
    save_packed(frame, folder / "packed.json")
    packed = load(folder / "packed.json")
    wanted = frame.drop(columns="text").assign(seconds=[float(f"{value:.6g}") for value in frame["seconds"]])
    pd.testing.assert_frame_equal(packed, wanted)
    assert pack(packed) == pack(frame) == json.loads((folder / "packed.json").read_text())
    save_packed(frame, folder / "packed.json.gz")
    pd.testing.assert_frame_equal(load(folder / "packed.json.gz"), wanted)
    assert (folder / "packed.json.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_parts_of_different_origin_stay_apart(tmp_path):
    opened(tmp_path, 0).append([example(1)])
    CellFile(tmp_path, CELL, SETTINGS, PROVENANCE | {"date": "2026-11-25"}, 1).append([example(0)])
    frame = load(tmp_path)
    assert [row["provenance"]["date"] for row in pack(frame)] == ["2026-11-24", "2026-11-25"]
    save_packed(frame, tmp_path / "packed.json")
    pd.testing.assert_frame_equal(load(tmp_path / "packed.json"), frame.drop(columns="text"))


@pytest.mark.parametrize(("old", "new"), OLD_SPELLINGS.items())
def test_files_with_an_old_spelling_of_a_rule_are_read_and_found(old, new, tmp_path):
    opened(tmp_path, cell=replace(CELL, rule=old)).append([example(0)])
    assert load(tmp_path)["rule"].tolist() == [new]
    again = opened(tmp_path, cell=replace(CELL, rule=new))
    assert again.done == {0}
    again.append([example(1)])
    assert load(tmp_path)["number"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="settings window: 64 there, 32 now"):
        opened(tmp_path, cell=replace(CELL, rule=new), window=32)


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("/somewhere/kara_hf/__main__.py", "python -m kara_hf"),
        ("/somewhere/bin/kara-hf", "kara-hf"),
        (str(Path.cwd() / "examples" / "a.py"), "python examples/a.py"),
    ],
)
def test_a_command_is_told_as_anybody_would_type_it(monkeypatch, program, shown):
    monkeypatch.setattr("sys.argv", [program, "--n", "3", str(Path.cwd() / "out")])
    assert provenance("cpu")["command"] == f"{shown} --n 3 out"
