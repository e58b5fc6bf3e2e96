"""What visitors may ask for, and which models they may choose."""

import copy
import json
import threading
import time
from pathlib import Path

import pytest
from support.demo import DEEP, DEEP_FOLDER, SETTINGS, TINY, make

from kara_hf import KaraConfig, KVCompressConfig, PoDSharing
from kara_hf.demo.app import _show_choice, _show_model
from kara_hf.demo.models import BUNDLED, Models
from kara_hf.demo.presets import BITS, DEFAULTS, KARA, METHOD_PRESETS, OWN, SMALL_DEFAULTS, TABLE, TRACE, make_method
from kara_hf.demo.request import Limits
from kara_hf.integration.shape import layer_kinds, model_shape

BAD = {
    "empty text": (
        {"task": OWN, "text": "  \n"},
        "prompt='  .n' is not possible: prompt must be some text to continue",
    ),
    "unknown words": (
        {"task": OWN, "text": "ba : 8 ; What does it mean"},
        "knows only the words .* not 'What', 'does', 'mean'",
    ),
    "too long a text": ({"task": OWN, "text": "ba " * 5000}, "4,096 tokens at most, not 5,000"),
    "far too long a text": ({"task": OWN, "text": "x" * 10**6}, "131,072 letters long at most, not 1,000,000"),
    "too long a task": ({"length": 10**9}, "length=1000000000 is not possible: length must be a whole number"),
    "no length": ({"length": None}, "length=None is not possible"),
    "half a token": ({"length": 80.5}, "length=80.5 is not possible"),
    "a task beyond its range": ({"length": 4000}, "out of range for task 'trace'"),
    "no problem": ({"number": -1}, "problem=-1 is not possible"),
    "too many new tokens": ({"new": 10**6}, "most new tokens=1000000 is not possible"),
    "temperature": ({"temperature": -1}, "temperature=-1 is not possible"),
    "no temperature": ({"temperature": None}, "temperature=None is not possible"),
    "seed": ({"seed": 1e300}, "seed=1e.300 is not possible"),
    "infinite length": ({"length": float("inf")}, "length=inf is not possible"),
    "retention": (
        {"settings": {"retention": 40}},
        r"retention=40 is not possible: retention must be a number in \(0, 1\]",
    ),
    "retention left empty": ({"settings": {"retention": None}}, "retention=None is not possible"),
    "window": ({"settings": {"window": -7}}, "window=-7 is not possible"),
    "window left empty": ({"settings": {"window": None}}, "window=None is not possible"),
    "observation left empty": (
        {"choice": "KV-Compress", "settings": {"observation": 0}},
        "observation=0 is not possible",
    ),
    "block size": ({"choice": "KV-Compress", "settings": {"block_size": 0}}, "block_size=0 is not possible"),
    "score": ({"settings": {"score": "best"}}, "score='best' is not possible"),
    "a folder as a score": (
        {"settings": {"score": "src/kara_hf"}},
        "score='src/kara_hf' is not possible.*one of blend",
    ),
    "bits": ({"settings": {"bits": "3"}}, "bits='3' is not possible: bits must be one of all, 8, 4"),
    "a table": (
        {"task": TABLE, "length": 300},
        "Table is in English, which tiny_reasoner does not know: choose Long tr",
    ),
    "no map": ({"choice": "PoD"}, "PoD needs a map .* tiny_reasoner has none: choose HuggingFaceTB/"),
    "no model": ({"model": ""}, "model='' is not possible: choose tiny_reasoner, deep_reasoner or a hub id"),
    "a folder": ({"model": "/etc"}, "model='/etc' is not possible: .* named when the demo is started"),
    "a folder above": ({"model": "../main"}, "model='../main' is not possible"),
    "a folder that looks like an id": ({"model": "src/kara_hf"}, "model='src/kara_hf' is not possible"),
    "the home folder": ({"model": "~/model"}, "is not possible"),
    "an address": ({"model": "http://127.0.0.1/x"}, "is not possible"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_remedy(models, case, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message) as raised:
        make(models, **changes)
    assert len(str(raised.value)) < 500


def test_an_unknown_model_is_named_soon(models):
    begun = time.perf_counter()
    with pytest.raises(OSError, match="model='nobody/has-this' cannot be loaded: the hub"):
        make(models, model="nobody/has-this")
    assert time.perf_counter() - begun < 20
    with pytest.raises(ValueError, match="this demo offers tiny_reasoner only"):
        Models(hub=False).load("nobody/has-this")


def test_limits_hold(models):
    with pytest.raises(ValueError, match="length must be a whole number from 1 to 50"):
        make(models, limits=Limits(new=50), length=80)
    session = make(models, limits=Limits(new=20), task=OWN, text="ba : 8 ; xa : 4 ; ? ba xa >")
    assert session.runs[0].generation.max_new_tokens == 20
    with pytest.raises(ValueError, match="10 tokens at most"):
        make(models, limits=Limits(prompt=10), task=OWN, text="ba : 8 ; xa : 4 ; qo : ba + xa ; ? qo xa >")


def test_models_of_a_hub_make_room_for_others(monkeypatch):
    loading, waiting = threading.Event(), threading.Event()

    def load(name, place, sharing, **options):
        if name == "org/slow":
            loading.set()
            assert waiting.wait(20)
        return f"{name} from {place}"

    monkeypatch.setattr("kara_hf.demo.models.Loaded", load)
    monkeypatch.setattr("kara_hf.demo.models.on_hub", lambda name: name)
    models = Models()
    slow = threading.Thread(target=models.load, args=("org/slow",))
    slow.start()
    assert loading.wait(20)
    assert models.load(TINY) == f"{TINY} from {BUNDLED[TINY]}"  # while the other one is still loading
    waiting.set()
    slow.join()
    for number in range(4):
        models.load(f"org/m{number}")
    assert list(models._loaded) == [TINY, "org/m1", "org/m2", "org/m3"]


def test_named_folders_can_be_chosen_and_no_others(tmp_path):
    import shutil

    for name in ("mine", "hidden"):
        shutil.copytree(BUNDLED[TINY], tmp_path / name)
    models = Models([str(tmp_path / "mine")], device="cpu")
    assert models.names == ["mine", TINY]
    assert models.load("mine") is models.load("mine")
    for name in (str(tmp_path / "mine"), str(tmp_path / "hidden"), "hidden"):
        with pytest.raises((ValueError, OSError)):
            models.load(name)
    with pytest.raises(ValueError, match="another model is called mine"):
        Models([str(tmp_path / "mine"), str(tmp_path / "mine")])


def test_code_of_a_model_runs_only_if_a_flag_says_so(tmp_path):
    import shutil

    folder = tmp_path / "mine"
    shutil.copytree(BUNDLED[TINY], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    with pytest.raises((OSError, ValueError)):
        Models([str(folder)], device="cpu", trust_remote_code=False).load("mine")
    assert not (tmp_path / "ran").exists()


def test_a_map_is_of_its_model_and_saves_what_it_was_explored_for(models):
    sharing, config = PoDSharing.from_pretrained(DEEP_FOLDER), models.load(DEEP).model.config
    sharing.check(model_shape(config), layer_kinds(config))
    assert sharing.model == model_shape(config)
    assert sharing.saving(sharing.origin["at_tokens"]) >= sharing.origin["saving"] == 0.25


def test_methods_show_the_settings_that_they_have(models):
    for name, choice in METHOD_PRESETS.items():
        assert choice.about and set(choice.settings) <= set(SMALL_DEFAULTS), name


@pytest.mark.parametrize("choice", [name for name, method in METHOD_PRESETS.items() if "bits" in method.settings])
def test_bits_are_those_of_the_cache(models, choice):
    loaded = models.load(DEEP if METHOD_PRESETS[choice].shares else TINY)
    for bits in BITS:
        method = make_method(choice, {**SETTINGS, "pin": (), "bits": bits}, loaded, 0)
        assert method.settings.get("bits") == (None if bits == "all" else int(bits))
        assert (f"{bits} bits" in method.describe()) == (bits != "all")


def test_settings_begin_with_what_suits_the_model(models):
    """The bundled model's own, and for others what the caches do where nothing is said."""
    names = list(DEFAULTS)
    of_pod = dict(zip(names, _show_choice(names, models, TRACE, "Kara + PoD", TINY)[3:], strict=True))
    assert _show_choice(names, models, TRACE, "Kara + PoD", TINY)[1]["value"] == DEEP == models.with_map
    assert of_pod["window"]["value"] == KaraConfig.window and of_pod["recent"]["value"] == KaraConfig.recent
    kept = dict(zip(names, _show_choice(names, models, TRACE, "Random control", TINY)[3:], strict=True))
    assert [name for name in names if "value" in kept[name]] == ["retention"]  # the visitor's own stay
    for model, defaults in ((TINY, SMALL_DEFAULTS), ("org/other", DEFAULTS)):
        shown = dict(zip(names, _show_model(names, KARA, model), strict=True))
        assert {name: shown[name]["value"] for name in names} == defaults | {"retention": 0.4}
    assert Models(hub=False).with_map is None and Models().with_map.endswith("SmolLM2-135M-Instruct")


def test_a_language_model_gets_the_caches_as_they_come(models):
    """Nothing but what the page shows."""
    loaded = replace_words(models.load(TINY))
    for choice, config in (("Kara", KaraConfig), ("KV-Compress", KVCompressConfig)):
        settings = DEFAULTS | {"pin": (), "retention": config.retention or 0.25, "recent": 0.5, "protected": 0.5}
        made = make_method(choice, settings, loaded, 0).config
        assert made == config(retention=settings["retention"])
    assert make_method("Kara", DEFAULTS | {"pin": (), "recent": 32.0}, loaded, 0).config.recent == 32


def replace_words(loaded):
    """The same model, as one that knows English."""
    other = copy.copy(loaded)
    other.own_words = False
    return other
