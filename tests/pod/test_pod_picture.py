"""The picture of what exploration found."""

import math
import re
import sys

import numpy as np
import pytest
from support.marks import slow
from support.similarities import drawn, made, symmetric

from kara_hf.pod import plot as plotting
from kara_hf.pod.picture import picture_of

GOLDEN = symmetric({(0, 1): 0.8, (0, 2): 0.3, (1, 2): 0.7, (0, 3): 0.6, (1, 3): 0.6, (2, 3): 0.9, (3, 4): 0.2}, 5)


@pytest.mark.parametrize(("layers", "heads"), [slow(1, 1), (18, 4)])
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
    colours = (255 * picture[..., :3]).astype(int) @ (1, 2**8, 2**16)
    assert len(np.unique(colours)) > 20


def test_a_picture_shows_the_groups():
    kinds = ("full", "full", None, "full", "full")
    values = GOLDEN.clone()
    values[2] = values[:, 2] = math.nan
    found = made(values, kinds=kinds, origin={"model_name": "<it>"})
    drawn_ = picture_of(found, found.group(0.5))
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
        with pytest.raises(ImportError, match=rf"{library} is not installed; run: pip install 'kara_hf\[plot\]'"):
            plotting.plot(found, found.group(0.5), tmp_path / f"it.{suffix}")
