"""Groups of layers that follow from how alike they attend."""

import json
import math

import pytest
import torch
from support.architectures import build
from support.batches import ids
from support.similarities import drawn, leads, made, symmetric

from kara_hf.pod.explore import LayerSimilarity, explore
from kara_hf.pod.similarity import groups_of

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
