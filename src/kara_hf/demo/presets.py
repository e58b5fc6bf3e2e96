"""What visitors choose from: tasks, methods and their settings, in the words that the page shows."""

from dataclasses import dataclass
from typing import Any

from ..config import KaraConfig, KVCompressConfig, require
from ..methods.caches import CACHES, ConfiguredCache, configured_caches
from ..tasks import english as text  # noqa: F401
from ..tasks import reasoner_tasks as bundled  # noqa: F401  they register their tasks
from ..tasks.task import Example, make_task
from .models import BUNDLED, SUGGESTED, Loaded

TRACE, NEEDLE, OWN = "Long trace", "Needle", "Own text"
STORY, CONVERSATION, TABLE = "Story", "Conversation", "Table"
ASKED = "KV-Compress, published"


@dataclass(frozen=True)
class TaskPreset:
    """A task preset.

    Attributes:
        about: what it asks for.
        bundled: name of the task for the bundled model, with ``{}`` for its length; None: it is not theirs.
        english: the same for other models; None: the visitor's own text.
        length: of the task at first.
        method: that shows most of it, a key of `METHOD_PRESETS`; None: any.
    """

    about: str
    bundled: str | None
    english: str | None
    length: int
    method: str | None


TASK_PRESETS = {
    TRACE: TaskPreset(
        "A chain of sums or of assignments, worked out line by line: every line needs values from lines far back. What "
        "a method drops there, it cannot look up again.",
        "trace:generated={}",
        "program-trace:generated={}",
        600,
        "Kara",
    ),
    NEEDLE: TaskPreset(
        "Facts hidden in a long text, some of them asked for at its end. Here the prompt is what has to be compressed.",
        "recall:length={}",
        "niah:length={}",
        1024,
        ASKED,
    ),
    STORY: TaskPreset(
        "A long story in English, in which facts about people are stated once. The one in its middle is asked for.",
        None,
        "stated-once:length={}",
        1024,
        ASKED,
    ),
    CONVERSATION: TaskPreset(
        "Two people talk in English, and one of them mentions a number. It is asked for at the end.",
        None,
        "conversation:length={}",
        1024,
        ASKED,
    ),
    TABLE: TaskPreset(
        "A table of parcels, of which one row is asked for. All rows look alike, so little tells which one will count.",
        None,
        "table:length={}",
        1024,
        ASKED,
    ),
    OWN: TaskPreset(
        "Any text, to be continued: with the bundled model in the words of its own problems, with others in any.",
        None,
        None,
        400,
        None,
    ),
}


@dataclass(frozen=True)
class MethodPreset:
    """A method preset.

    Attributes:
        about: what it does.
        name: key of `kara_hf.methods.caches.METHODS`.
        settings: which settings are shown for it.
        retention: with which it is shown at first.
        fixed: settings that it always has.
        small: the same with the bundled model alone.
        shares: whether it needs a map for PoD.
    """

    about: str
    name: str
    settings: tuple[str, ...] = ()
    retention: float = 0.4
    fixed: tuple[tuple[str, Any], ...] = ()
    small: tuple[tuple[str, Any], ...] = ()
    shares: bool = False


_KARA = ("retention", "window", "recent", "sinks", "pin", "bits", "score", "anchor_share", "compress_prompt")
_KV = ("retention", "protected", "sinks", "pin", "bits", "observation", "metric", "block_size")
_ALL_QUERIES = (("queries", None),)  # what the bundled model needs: a few tell little of their keys
_RAGGED = (("votes", "sum"), ("levels", None))  # heads that differ are what there is to see
FULL, KARA, RANDOM = "Full cache", "Kara", "Random control"
METHOD_PRESETS = {
    KARA: MethodPreset(
        "Cuts what is generated into windows. Once a window is complete, every head keeps its share of it, for good.",
        "kara",
        _KARA,
        small=_ALL_QUERIES,
    ),
    "KV-Compress": MethodPreset(
        "Cuts the prompt too, to one budget, again and again. Half of it goes to the newest tokens.",
        "kv-compress",
        _KV,
        retention=0.25,
    ),
    ASKED: MethodPreset(
        "As it was published: one budget for all heads of all layers, in which a head that needs more keeps more, "
        "and few tokens are kept for being new. For a question at the end of the prompt.",
        "kv-compress",
        tuple(name for name in _KV if name != "protected"),
        retention=0.25,
        fixed=tuple(KVCompressConfig.PUBLISHED.items()),
        small=(("protected", 8),),
    ),
    "PoD": MethodPreset(
        "Drops no token: layers that attend alike keep keys of far tokens once. Without an adapter for its map a model "
        "loses answers.",
        "pod",
        ("bits",),
        shares=True,
    ),
    "Kara + PoD": MethodPreset(
        "Kara, on shared keys: one choice for all layers of a group.", "kara", _KARA, small=_ALL_QUERIES, shares=True
    ),
    "KV-Compress + PoD": MethodPreset(
        "KV-Compress, on shared keys: the heads of leads compete.",
        "kv-compress",
        _KV,
        retention=0.5,
        small=_RAGGED,
        shares=True,
    ),
    RANDOM: MethodPreset(
        "The control: as Kara, with as many tokens, chosen at random. What it loses is what the choice is worth.",
        "kara",
        ("retention", "window", "recent", "sinks", "pin", "bits", "compress_prompt"),
        fixed=(("score", "random"),),
    ),
    FULL: MethodPreset("Transformers' own cache, which keeps everything.", "full"),
}
# What settings begin with, with the bundled model: those of `kara-hf generate` there, and blocks that fit short texts.
SMALL_DEFAULTS: dict[str, Any] = {
    "retention": 0.4,
    "window": 64,
    "recent": 32,
    "score": "bidirectional",
    "anchor_share": 1.0,
    "compress_prompt": False,
    "protected": 8,
    "sinks": 4,
    "pin": "",
    "bits": "all",
    "observation": 8,
    "metric": "l2",
    "block_size": 4,
}


# With others: what the caches do where nothing is said.
DEFAULTS: dict[str, Any] = SMALL_DEFAULTS | {
    **{name: getattr(KVCompressConfig, name) for name in ("protected", "observation", "block_size")},
    **{name: getattr(KaraConfig, name) for name in ("window", "recent", "score", "anchor_share")},
}


def defaults_of(model: str) -> dict[str, Any]:
    """What the settings of a model begin with, by its name."""
    return SMALL_DEFAULTS if model in BUNDLED else DEFAULTS


BITS = ["all", "8", "4"]
SCORES = ["blend", "bidirectional", "key-difference", "causal", "recency", "random-chunks", "random"]


def make_method(choice: str, settings: dict[str, Any], loaded: Loaded, seed: int) -> ConfiguredCache:
    """The method of that name in `METHOD_PRESETS`, with those of `settings` that it has.

    Raises:
        ValueError: a setting is not possible, or the model has no map for PoD.
    """
    chosen = METHOD_PRESETS[choice]
    given = {name: settings[name] for name in chosen.settings} | dict(chosen.fixed)
    given |= dict(chosen.small) if loaded.own_words else {}
    for name in {"recent", "protected"} & given.keys():  # a share below 1, and tokens from there on
        number = given[name]
        given[name] = int(number) if isinstance(number, float) and number.is_integer() else number
    if "score" in given:  # by name alone: a path would read a file
        require(given["score"] in SCORES, "score", given["score"], f"one of {', '.join(SCORES)}")
    if "bits" in given:
        bits = given.pop("bits")
        require(bits in BITS, "bits", bits, f"one of {', '.join(BITS)}")
        given |= {} if bits == "all" else {"bits": int(bits)}
    if "seed" in CACHES[chosen.name].options:
        given["seed"] = seed
    if "block_size" not in given and chosen.name != "full":
        given["block_size"] = _block_size(given.get("window", 16))
    if chosen.shares:
        if loaded.sharing is None:
            raise ValueError(
                f"{choice} needs a map of layers that share keys, and {loaded.name} has none: choose {SUGGESTED}, or "
                "start the demo with --model and --sharing of a map that `kara-hf pod explore` made"
            )
        given["sharing"] = loaded.sharing
    return configured_caches([chosen.name], given, {})[chosen.name]


def _block_size(window: Any) -> int:
    """The largest usual block that a window is a multiple of."""
    return next((size for size in (16, 8, 4, 2) if isinstance(window, int) and window % size == 0), 1)


def make_example(task: str, length: int, number: int, loaded: Loaded) -> Example:
    """Example `number` of a preset that has problems.

    Raises:
        ValueError: the task cannot be so long, or the model does not know its words.
    """
    preset = TASK_PRESETS[task]
    name = preset.bundled if loaded.own_words else preset.english
    if name is None:
        raise ValueError(
            f"{task} is in English, which {loaded.name} does not know: choose {TRACE} or {NEEDLE}, or another model, "
            f"such as {SUGGESTED}"
        )
    return make_task(name.format(length), loaded.tokenizer).example(number)


def prompt_of(example: Example) -> str:
    """What the model reads."""
    return example.context + example.question
