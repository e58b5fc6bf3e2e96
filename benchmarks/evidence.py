"""Tables and figures of docs/evidence.md, from the packed results of the evaluation kit.

kara-hf evaluate --no-text --batch 50 ... --out results      # the commands are in the results
kara-hf report results --pack benchmarks/results/evidence.json.gz
python benchmarks/evidence.py

kvpress beside our store, and a calibration that was fitted to two of the tasks alone, have files of their own:

python benchmarks/peer_kvpress.py --parts tasks ... --results kvpress; kara-hf evaluate --equal tokens ... --out kvpress
kara-hf calibrate --data problems:trace=0.5,fact=0.5 --samples 512 --out narrow
kara-hf evaluate --methods calibrated --calibration narrow ... --out results-narrow
"""

from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import pandas as pd
import typer
from kv_compress_tables import table

from kara_hf.evaluation.measure.results import load
from kara_hf.evaluation.report.statistics import summarise
from kara_hf.methods.registry import METHODS

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  behind the choice of what draws

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evidence.json.gz"
DOC = ROOT / "docs" / "evidence.md"
FIGURE = ROOT / "docs" / "evidence.png"
KVPRESS = ROOT / "benchmarks" / "results" / "kvpress_tasks.json.gz"
NARROW = ROOT / "benchmarks" / "results" / "calibration_narrow.json.gz"
UNEQUAL = 0.02  # share of the reference's bytes by which a method may hold more
BUDGETS = (0.5, 0.25, 0.125, 0.0625)
NARROWED = (
    ("trace:generated=300", "prompt-kept", 0.25, 0.125),
    ("fact:generated=300", "prompt-kept", 0.125, 0.0625),
    ("recall:length=384", "query-agnostic", 0.5, 0.25),
    ("copy:length=384", "query-agnostic", 0.5, 0.25),
)
COLOURS = {
    "oracle": "#000000",
    "calibrated": "#56b4e9",
    "key-norm": "#009e73",
    "mean-square": "#0072b2",
    "kara-top-k": "#d55e00",
    "kara": "#cc79a7",
    "kv-compress": "#e69f00",
    "random": "#888888",
}
MARKS = dict(zip(COLOURS, "*PosD^vX", strict=True))


def blocks(rows: pd.DataFrame) -> dict[tuple[str, str], str]:
    """A Markdown table for each task and rule: methods down, budgets across."""
    found = {}
    order = {name: place for place, name in enumerate(METHODS)}
    whole = rows[rows["rule"] == "none"]
    for (task, rule), part in rows[rows["rule"] != "none"].groupby(["task", "rule"], sort=False):
        budgets = [budget for budget in BUDGETS if (part["budget"] == budget).any()]
        lines = []
        for _, row in whole[whole["task"] == task].sort_values("method", key=lambda s: s.map(order)).iterrows():
            score = f"{100 * row['score']:.1f} %, {100 * row['resident']:.0f} %"
            lines.append([row["method"], score, *[""] * (len(budgets) - 1)])
        for method in sorted(part["method"].unique(), key=lambda name: (order.get(name, len(order)), name)):
            cells = part[part["method"] == method].set_index("budget")
            lines.append([method, *(_cell(cells.loc[b]) if b in cells.index else "" for b in budgets)])
        found[task, rule] = table(["method", *(f"{100 * budget:g} %" for budget in budgets)], lines)
    return found


def _cell(row: pd.Series) -> str:
    """Score, in bold where its difference to random leaves out 0; gap closed; bytes held, and how many too many."""
    score = f"{100 * row['score']:.1f} %"
    if row["difference_low"] > 0 or row["difference_high"] < 0:
        score = f"**{score}**"
    gap = "" if np.isnan(row["gap"]) or row["method"] == "oracle" else f", gap {100 * row['gap']:.0f} %"
    over = f" (+{100 * row['bytes_apart']:.0f} %)" if row["bytes_apart"] > UNEQUAL else ""
    return f"{score}{gap}, {100 * row['resident']:.0f} %{over}"


def lost(rows: pd.DataFrame) -> str:
    """A line for each method that is below random by a whole interval somewhere: where, and by how many points."""
    found = rows[rows["difference_high"] < 0].sort_values(["method", "task", "rule", "budget"])
    lines = []
    for method, part in found.groupby("method", sort=False):
        places = [
            f"{row['task'].partition(':')[0]} {row['rule']} {100 * row['budget']:g} % ({100 * row['difference']:+.1f})"
            for _, row in part.iterrows()
        ]
        lines.append(f"- `{method}`: {', '.join(places)}")
    return "\n".join(lines)


def narrow(frame: pd.DataFrame, others: pd.DataFrame) -> str:
    """Right answers of a calibration fitted to all kinds of task and of one fitted to two of them."""
    scores = frame.groupby(["method", "task", "rule", "budget"])["score"].mean()
    found = {
        "traces, facts, recall, copying": scores["calibrated"],
        "traces, facts": others.groupby(["task", "rule", "budget"])["score"].mean(),
        "`key-norm`, which is not fitted": scores["key-norm"],
    }
    columns = [(task, rule, budget) for task, rule, *budgets in NARROWED for budget in budgets]
    heads = [f"{task.partition(':')[0]} {rule}, {100 * budget:g} %" for task, rule, budget in columns]
    lines = [[name, *(f"{100 * scores[column]:.1f} %" for column in columns)] for name, scores in found.items()]
    return table(["fitted to", *heads], lines)


def origin(frame: pd.DataFrame) -> str:
    """Where the numbers come from."""
    source = frame["provenance"].iloc[0]
    dates = sorted({each["date"] for each in frame["provenance"]})
    devices = " and ".join(dict.fromkeys(each["device"] for each in frame["provenance"]))
    versions = source["versions"]
    return (
        f"{int(frame.groupby('task')['number'].nunique().min())} problems of each kind; {devices}, "
        f"{source['threads']} thread, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{source['dtype']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Accuracy against bytes held, a panel for each task and rule."""
    panels = list(rows[rows["rule"] != "none"].groupby(["task", "rule"], sort=False))
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.4 * across, 3.4 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, ((task, rule), part) in zip(axes.flat, panels, strict=False):
        for method, colour in COLOURS.items():
            line = part[part["method"] == method].sort_values("resident")
            if len(line):
                spread = [line["score"] - line["low"], line["high"] - line["score"]]
                axis.errorbar(
                    100 * line["resident"],
                    100 * line["score"],
                    yerr=100 * np.array(spread),
                    color=colour,
                    marker=MARKS[method],
                    markersize=6,
                    linewidth=1.2,
                    capsize=2,
                    label=method,
                )
        full = rows[(rows["task"] == task) & (rows["method"] == "full")]
        axis.axhline(100 * full["score"].iloc[0], color="black", linewidth=0.8, linestyle=":", label="full cache")
        axis.set_title(f"{task}, {rule}", fontsize=10)
        axis.set_xlabel("most bytes held, % of the full cache")
        axis.set_ylabel("right answers, %")
        axis.set_ylim(-4, 104)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(text: str, parts: dict[str, str]) -> str:
    """`text` with what stands between ``<!-- name -->`` and ``<!-- end -->`` replaced.

    Raises:
        ValueError: a part has no place.
    """
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not mark or not end:
            raise ValueError(f"the page has no place for {name!r}")
        text = f"{before}{mark}{part}\n{end}{after}"
    return text


def parts(frame: pd.DataFrame, rows: pd.DataFrame) -> dict[str, str]:
    """What the page shows of the results, by the name of its place."""
    import scores  # registers what it tries

    tables = {f"{task} {rule}": text for (task, rule), text in blocks(rows).items()}
    peers = load(KVPRESS)
    tables |= {f"kvpress {task} {rule}": text for (task, rule), text in blocks(summarise(peers)).items()}
    tables |= {"kvpress": origin(peers), "narrow": narrow(frame, load(NARROW))}
    tried = f"{origin(load(scores.RESULTS))}\n\n{scores.markdown()}"
    return {"origin": origin(frame), "scores": tried, "lost": lost(rows)} | tables


def main(
    results: Annotated[Path, typer.Argument(help="Packed results.")] = RESULTS,
    doc: Annotated[Path, typer.Option(help="Page whose tables are written.")] = DOC,
    figure: Annotated[Path, typer.Option(help="PNG file.")] = FIGURE,
) -> None:
    """Writes tables and figure."""
    frame = load(results)
    rows = summarise(frame)
    draw(rows, figure)
    doc.write_text(write(doc.read_text("utf-8"), parts(frame, rows)), "utf-8")


if __name__ == "__main__":
    typer.run(main)
