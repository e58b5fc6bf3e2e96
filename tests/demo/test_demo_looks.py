"""How the demo looks in a real browser: on any screen, in light and dark, and to any eye."""

import itertools

import numpy as np
import pytest
from support.demo_browser import PHONE, WIDE, fill, pace, run

LOOKS = """() => {
  const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const ground = getComputedStyle(player.root).backgroundColor;
  const over = colour => {
    for (const each of [ground, colour]) { pen.fillStyle = each; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => part / 255);
  };
  return Object.fromEntries([...document.querySelectorAll(".kh-legend .t")].map(span => {
    const style = getComputedStyle(span), cues = ["borderTopWidth", "borderBottomWidth", "borderBottomStyle",
      "textDecorationLine", "outlineStyle"].map(name => style[name]).join(" ");
    return [span.classList[1], {ground: over(style.backgroundColor), text: over(style.color), style: cues}];
  }));
}"""
CONES = {  # what is left of linear RGB without one kind of cones (Machado, Oliveira and Fernandes, 2009)
    "full colour": np.eye(3),
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritanopia": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def lab(colour, cones):
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    linear = np.clip(cones @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]), linear @ np.array(
        [0.2126, 0.7152, 0.0722]
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart_and_texts_read(visit, scheme):
    page = visit(color_scheme=scheme)
    got = page.evaluate(LOOKS)
    tinted = {name: np.array(each["ground"]) for name, each in got.items() if name not in ("evicted", "fresh", "whole")}
    assert set(tinted) == {"pinned", "prompt", "sealed", "open", "recent", "shared"}
    for kind, cones in CONES.items():
        for (a, one), (b, other) in itertools.combinations(tinted.items(), 2):
            apart = np.linalg.norm(lab(one, cones)[0] - lab(other, cones)[0])
            assert apart > 9 or got[a]["style"] != got[b]["style"], (kind, a, b, apart)
    assert len({each["style"] for each in got.values()}) >= 7  # a second cue, for those who see no colours at all
    for name, each in got.items():
        if name != "evicted":
            light, dark = sorted((lab(np.array(each[part]), np.eye(3))[1] for part in ("ground", "text")), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 4.5, name


def test_it_fits_a_laptop_and_a_phone(visit):
    for viewport in (WIDE, PHONE):
        page = visit(viewport=viewport)
        fill(page, "length", 80)
        pace(page, "full speed")
        run(page)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"]
        for name in ("#start", "#stop", "#step", "#pause"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"] and box["height"] >= 24
        panes = [page.locator(".kh-pane").nth(i).bounding_box() for i in (0, 1)]
        assert all(box["width"] > 250 for box in panes)
        beside = panes[0]["y"] == panes[1]["y"]
        assert beside == (viewport is WIDE)
