"""How far settings move a language model from its full cache, per token and at equal resident bytes: what is scored by,
what is held of queries, how a budget is split between recent tokens and the rest, how votes are counted.

Documents are forced through the model, the prompt compressed too. A run that was stopped goes on where it was;
`kara-hf report` makes a page of its folder.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..common.case import Job, register
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
KEPT += ("loss", "full_loss", "resident", "difference", "difference_low", "difference_high", "wins", "losses")
SIZES: Row = {
    "model": "",
    "data": "",
    "column": "text",
    "pack": False,
    "methods": (
        "random",
        "streaming-llm",
        "kara",
        "kara, 32 queries",
        "kara, 8 queries",
        "kara, 8 queries, half recent",
        "key-difference",
        "key-difference, half recent",
        "kv-compress",
        "kv-compress, mean votes, half recent",
    ),
    "budgets": (0.5, 0.25),
    "documents": 4,
    "tokens": 1536,
    "prompt": 256,
    "window": 128,
    "out": "runs/divergence",
}
SMOKE: Row = {"methods": ("random", "kara, 8 queries"), "budgets": (0.5,), "documents": 1, "tokens": 200, "prompt": 40}
SMOKE |= {"window": 32}


def variants() -> dict[str, Any]:
    """Settings of the two caches beside the kit's own methods, by name."""
    from kara_hf.config import KaraConfig
    from kara_hf.methods.registry import Method, evictions, windows

    published = {"anchor_share": KaraConfig.anchor_share}
    made = {
        "kara, 32 queries": windows("bidirectional", queries=32, **published),
        "kara, 8 queries": windows("bidirectional", queries=8, **published),
        "kara, half recent": windows("bidirectional", recent=0.5, **published),
        "kara, 8 queries, half recent": windows("bidirectional", queries=8, recent=0.5, **published),
        "kara, 8 queries, quarter recent": windows("bidirectional", queries=8, recent=0.25, **published),
        "key-difference, half recent": windows("key-difference", recent=0.5),
        "key-difference, quarter recent": windows("key-difference", recent=0.25),
        "random, half recent": windows("random", recent=0.5),
        "kv-compress, mean votes": evictions(votes="mean"),
        "kv-compress, half recent": evictions(protected=0.5),
        "kv-compress, mean votes, half recent": evictions(votes="mean", protected=0.5),
        "kv-compress-uniform, mean votes, half recent": evictions(votes="mean", protected=0.5, levels=1),
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
    yield Job({"model": Path(model).name, "data": name}, partial(measured, run, model, data, name, sizes))


def measured(run: Run, model: str, data: str, name: str, sizes: Row) -> list[Row]:
    from kara_hf.evaluation import Document, divergence, make_method
    from kara_hf.evaluation.measure.identity import weights_of
    from kara_hf.evaluation.report.divergence_summary import Divergences
    from kara_hf.integration.loading import LoadedModel
    from kara_hf.methods.registry import SharedSettings
    from kara_hf.probing.data import PROBLEMS, token_samples, whole_documents

    known = variants()
    methods = [known[each] if each in known else make_method(each) for each in sizes["methods"]]
    loaded = LoadedModel(model, device=str(run.device), dtype="auto" if run.cuda else "float32")
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
            weights=weights_of(loaded.model, model),
            rules=["query-aware"],
            shared=SharedSettings(window=sizes["window"]),
        )
        asked = {method.name for method in methods}
        here = frame["task"].str.contains(f"{name}, {sizes['tokens']} tokens", regex=False)
        rows = Divergences(frame[here & frame["method"].isin(asked)]).rows
    return [{key: row[key] for key in KEPT if key in row} for row in rows]
