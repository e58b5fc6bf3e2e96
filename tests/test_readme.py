"""What the README shows runs."""

import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_example_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = (block for block in BLOCKS if "import" in block)
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    seen, kept, resident, full = re.match(r"tensor\(\[(\d+)\]\) tensor\((\d+)\) (\d+) (\d+)", out).groups()
    assert int(seen) == 17 + 599 and int(kept) == 17 + 8 * 16 + 599 - 8 * 64
    assert int(resident) < int(full)
    assert "(0, 17, 'prompt')" in out and "'sealed')" in out and "(584, 616, 'recent')" in out


def test_the_one_liner_stands_in_the_package_docstring_too():
    import kara_hf

    for line in (block.strip() for block in BLOCKS if "import" not in block):
        assert line in kara_hf.__doc__


@pytest.mark.parametrize("name", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("cache", ["KaraCache", "KVCompressCache"])
def test_settings_are_the_defaults(cache):
    import kara_hf

    (table,) = re.findall(rf"^\| `{cache}` \| default .*\n\|---.*\n((?:\|.*\n)+)", README, flags=re.M)
    shown = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", table, flags=re.M))
    settings = inspect.signature(getattr(kara_hf, cache)).parameters
    for name, default in shown.items():
        assert default.strip("`").strip('"') == str(settings[name].default)
    left_out = {"model", "block_size", "cuda_graph", "seed"}
    beside = {"retention"} if cache == "KVCompressCache" else set()
    assert set(shown) == set(settings) - left_out - beside


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, flags=re.M):
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()
