"""How far methods move a language model from its full cache, per token and at equal resident bytes: both caches as they
come and as published, with one setting changed, and controls.

Documents are forced through the model, the prompt compressed too. A run that was stopped goes on where it was;
`kara-hf report` makes a page of its folder.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..common.case import Job, register
from ..common.models import multiply_in_float32
from ..common.rows import Row
from ..common.run import Run
from .kit import folder_of

COLUMNS = [
    ("text", "{data}"),
    ("method", "{method}"),
    ("budget", "{budget:.1%}"),
    ("KL", "{kl:.4f} ({kl_low:.4f} to {kl_high:.4f})"),
    ("held / full", "{resident:.1%}"),
]
KEPT = ("method", "rule", "budget", "n", "tokens", "kl", "kl_low", "kl_high", "kl_median", "kl_99", "kl_max", "same")
KEPT += ("loss", "full_loss", "resident", "end", "difference", "difference_low", "difference_high", "wins", "losses")
SIZES: Row = {
    "model": "",
    "data": "",
    "column": "text",
    "pack": False,
    "methods": (
        "random",
        "streaming-llm",
        "kv-compress-random",
        "kara",
        "kara-published",
        "key-difference",
        "kv-compress",
        "kv-compress-published",
    ),
    "budgets": (0.5, 0.25, 0.125),
    "documents": 8,
    "tokens": 1536,
    "prompt": 256,
    "window": 128,
    "dtype": "",
    "sharing": "",
    "out": "runs/divergence",
}
SMOKE: Row = {"methods": ("random", "kara, 32 recent"), "budgets": (0.5,), "documents": 1, "tokens": 200, "prompt": 40}
SMOKE |= {"window": 32}


def variants() -> dict[str, Any]:
    """Default settings of both caches with one thing changed, by name, beside the kit's own methods."""
    from kara_hf.methods.registry import KARA, Method, evictions, windows

    made = {
        "kara, all queries": windows(**KARA | {"queries": None}),
        "kara, 2 queries": windows(**KARA | {"queries": 2}),
        "kara, 32 recent": windows(**KARA, recent=32),
        "kara, 64 a window": windows(**KARA, window=64),
        "kara, 256 a window": windows(**KARA, window=256),
        "kv-compress, sum of votes": evictions(votes="sum"),
        "kv-compress, 32 protected": evictions(protected=32),
        "kv-compress, no pooling": evictions(pool=1),
        "kv-compress, heads differ": evictions(levels=None),
    }
    return {name: Method(name, make, "a variant") for name, make in made.items()}


@register(
    "quality.divergence",
    "how far scores, held queries, recent shares and ways of voting move a language model from its full cache",
    COLUMNS,
    sizes=SIZES,
    smoke=SMOKE,
    device="any",
)
def divergence_jobs(run: Run, **sizes: Any) -> Iterator[Job]:
    from kara_hf.bundled import BUNDLED_MODEL

    data = sizes["data"] or "problems:trace=1"
    name = Path(data).name if Path(data).exists() else data
    model = sizes["model"] or str(BUNDLED_MODEL)
    dtype = sizes["dtype"] or ("auto" if run.cuda else "float32")
    labels = {"model": Path(model).name, "data": name, "dtype": dtype, "length": sizes["tokens"]}
    if sizes["sharing"]:
        labels["sharing"] = Path(sizes["sharing"]).name
    yield Job(labels, partial(measured, run, model, dtype, data, name, sizes))


def measured(run: Run, model: str, dtype: str, data: str, name: str, sizes: Row) -> list[Row]:
    from kara_hf.evaluation import Document, divergence, make_method
    from kara_hf.evaluation.measure.identity import weights_of
    from kara_hf.evaluation.report.divergence_summary import Divergences
    from kara_hf.integration.adapter import load_adapter
    from kara_hf.integration.loading import LoadedModel
    from kara_hf.methods.registry import SharedSettings
    from kara_hf.policy.sharing import PoDSharing
    from kara_hf.probing.data import PROBLEMS, token_samples, whole_documents

    known = variants()
    methods = [known[each] if each in known else make_method(each) for each in sizes["methods"]]
    loaded = LoadedModel(model, device=str(run.device), dtype=dtype)
    weights = weights_of(loaded.model, model)
    if not run.cuda and dtype != "float32":
        multiply_in_float32(loaded.model)
    place = sizes["sharing"]
    sharing = PoDSharing.from_pretrained(place) if place else None
    if sharing is not None:
        load_adapter(loaded.model, place, sharing)
    given: dict[str, Any] = {"length": sizes["tokens"], "count": sizes["documents"], "text_column": sizes["column"]}
    if sizes["pack"] or data.startswith(PROBLEMS):
        texts = list(token_samples(data, loaded.tokenizer, seed=None, **given))
    else:
        texts = whole_documents(data, loaded.tokenizer, **given)
    with folder_of(sizes["out"], run.smoke) as folder:
        frame = divergence(
            loaded.model,
            [Document(text.tolist(), sizes["prompt"]) for text in texts],
            methods,
            sizes["budgets"],
            out=folder,
            data=f"{name}, {sizes['tokens']} tokens, prompt {sizes['prompt']}",
            name=loaded.name,
            weights=weights,
            rules=["query-aware"],
            shared=SharedSettings(window=sizes["window"]),
            sharing=sharing,
        )
        asked = {method.name for method in methods}
        here = frame["task"].str.contains(f"{name}, {sizes['tokens']} tokens", regex=False)
        rows = Divergences(frame[here & frame["method"].isin(asked)]).rows
    return [{key: row[key] for key in KEPT if key in row and row[key] == row[key]} for row in rows]  # without NaN
