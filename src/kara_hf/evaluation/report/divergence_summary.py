"""What can be said of divergences: a row for each cell, in the order in which it is shown, and its numbers in words."""

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from ..measure.diverged import EQUAL, TASK
from .statistics import GROUP, Estimate, compare, mean_interval
from .summary import FULL, RULE_LABELS, Mark, Row, budget_of, is_known, percent, rounded

BINS = 8  # of distances behind the prompt

REFERENCE = "random"


class Divergences:
    """A summary of what `kara_hf.evaluation.load_divergence` returns.

    Args:
        frame: the lines.
        reference: method that the others are compared with, on the same documents and at the same budget; None:
            random tokens, or else the first method that has a budget.

    Attributes:
        rows: one for each cell, seeds apart. Every interval is at 95 %, by bootstrap over documents.

            n, tokens: documents, and forced tokens of all of them; kl with kl_low and kl_high: mean of the documents'
            means; kl_median, kl_99, kl_max: over all tokens; same and loss, each with low and high: the share of equal
            likeliest tokens, and the loss beyond the full cache's; resident, end: shares of the full cache's bytes that
            it holds at most, and at the end; apart: by how much of its budget of bytes it holds more;
            difference with low, high, wins (documents at which it diverges less) and losses; bytes_apart, by how much
            it holds more than the reference; tokens_per_second.
        methods: in the order in which they are shown.

    Raises:
        ValueError: the reference was not measured.
    """

    def __init__(self, frame: pd.DataFrame, reference: str | None = None):
        methods = list(frame["method"].unique())
        if reference is not None and reference not in methods:
            raise ValueError(f"reference={reference!r} was not measured; choose one of {', '.join(methods)}")
        budgeted = list(frame.loc[frame["rule"] != "none", "method"].unique()) or methods
        self.reference = reference or (REFERENCE if REFERENCE in budgeted else budgeted[0])
        self.frame = frame
        self.tokens: dict[tuple[Any, ...], list[np.ndarray]] = {}
        self.methods = sorted(methods, key=lambda m: (m != FULL, m in budgeted, m != self.reference, m))
        rules = list(RULE_LABELS)
        self.rows = sorted(
            self._summarise(),
            key=lambda row: (
                *(row[name] for name in ("model", "weights", "task")),
                rules.index(row["rule"]),
                row["equal"],
                -row["budget"],
                row["kl"],
            ),
        )

    def _summarise(self) -> Iterator[Row]:
        cells = dict(iter(self.frame.groupby(GROUP)))
        means = {key: cell.groupby("number")["kl_mean"].mean() for key, cell in cells.items()}
        for key, cell in cells.items():
            arrays = []
            for path in cell["arrays"]:
                with np.load(path) as found:
                    arrays.append(found["kl"])
            self.tokens[key] = arrays
            middle, high = np.quantile(np.concatenate(arrays), [0.5, 0.99])
            by_document = cell.groupby("number")
            row = dict(zip(GROUP, key, strict=True)) | {"n": len(by_document), "tokens": int(cell["tokens"].sum())}
            row |= named("kl", mean_interval(means[key]))
            row |= {"kl_median": float(middle), "kl_99": float(high), "kl_max": float(cell["kl_max"].max())}
            row |= named("same", mean_interval(by_document["same"].mean()))
            row |= named("loss", mean_interval((cell["loss"] - cell["full_loss"]).groupby(cell["number"]).mean()))
            row["full_loss"] = float(cell["full_loss"].mean())
            for name in ("resident", "end"):
                row[name] = float((cell[f"{name}_bytes"] / cell["full_bytes"]).mean())
            for name in ("resident_bytes", "full_bytes"):
                row[name] = float(cell[name].mean())
            by_bytes = row["rule"] != "none" and row["equal"] == "bytes"
            row["apart"] = row["resident"] / row["budget"] - 1 if by_bytes else math.nan
            seconds = float(cell["seconds"].sum())
            row["tokens_per_second"] = float((cell["tokens"] + cell["prompt"]).sum()) / seconds if seconds else math.nan
            other = (*key[:4], self.reference, *key[5:])
            found = compare(means[key], means[other]) if other in means and other != key else None
            row |= named("difference", found)
            row["bytes_apart"] = math.nan
            if found:
                row["bytes_apart"] = row["resident_bytes"] / float(cells[other]["resident_bytes"].mean()) - 1
            row |= {"wins": found.losses if found else math.nan, "losses": found.wins if found else math.nan}
            yield row

    def panels(self) -> Iterator[tuple[str, list[Row]]]:
        """For each model, data and rule its name and rows; what has no budget stands beside every rule."""
        several = len({(row["model"], row["weights"]) for row in self.rows}) > 1
        for (model, weights, task), found in groupby(self.rows, lambda r: (r["model"], r["weights"], r["task"])):
            rows = list(found)
            free = [row for row in rows if row["rule"] == "none"]
            kinds = dict.fromkeys((row["rule"], row["equal"]) for row in rows if row["rule"] != "none")
            for rule, equal in kinds or {("none", "bytes"): None}:
                shown = f"{model} ({weights[:8]})" if several else model
                label = RULE_LABELS[rule] + (", equal tokens" if equal == "tokens" else "")
                ruled = [row for row in rows if row["rule"] != "none" and (row["rule"], row["equal"]) == (rule, equal)]
                yield f"{shown}, {task.removeprefix(TASK)}, {label}", [*free, *ruled]

    def by_distance(self, row: Row, edges: np.ndarray) -> list[Estimate | None]:
        """Mean divergence of a cell in each bin of tokens behind the prompt, over the documents that reach it."""
        arrays = self.tokens[tuple(row[name] for name in GROUP)]
        found: list[Estimate | None] = []
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            means = [float(kl[low:high].mean(dtype=np.float64)) for kl in arrays if len(kl) > low]
            found.append(mean_interval(pd.Series(means)) if means else None)
        return found

    def edges(self, rows: list[Row]) -> np.ndarray:
        """Ends of at most `BINS` bins of distances behind the prompt."""
        most = max(len(kl) for row in rows for kl in self.tokens[tuple(row[name] for name in GROUP)])
        return np.unique(np.linspace(0, most, min(BINS, most) + 1).astype(int))

    def verdict(self, mark: Mark) -> str:
        """How many comparisons came out which way."""
        known = [row for row in self.rows if is_known(row["difference"])]
        rows = [row for row in known if decides(row)]
        unequal = len(known) - len(rows)
        less, more = sum(row["difference_high"] < 0 for row in rows), sum(row["difference_low"] > 0 for row in rows)
        apart = sum(abs(row["apart"]) > EQUAL for row in self.rows if is_known(row["apart"]))
        return (
            f"Of {len(rows)} comparisons with {mark(self.reference)} at equal bytes, or with fewer bytes on the better "
            f"side, {less} diverge less, {more} diverge more, and {len(rows) - less - more} are undecided at 95 %. "
            f"{unequal} more are at unequal bytes, and decide nothing. {apart} cells hold over {100 * EQUAL:g} % more "
            "or less than their budget."
        )


def named(name: str, estimate: Estimate | None) -> Row:
    """An estimate as fields of a row; NaN where there is none."""
    parts = (estimate.value, estimate.low, estimate.high) if estimate else (math.nan,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))


def nats(value: float) -> str:
    """A divergence with three digits, and no more places than it is worth."""
    return "" if not is_known(value) else "0" if value == 0 else f"{value:.3g}" if value >= 1e-4 else f"{value:.1e}"


def _between(row: Row, name: str, form: Callable[[float], str]) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f" ({form(low)} to {form(high)})" if is_known(low) else ""


def kl_of(row: Row) -> str:
    return nats(row["kl"]) + _between(row, "kl", nats)


def held_of(row: Row) -> str:
    """Share of the full cache's bytes, and behind it how far from the budget that is, where it is not equal."""
    apart = row["apart"]
    return percent(row["resident"]) + (f" ({apart:+.0%})" if is_known(apart) and abs(apart) > EQUAL else "")


def same_of(row: Row) -> str:
    return percent(row["same"])


def loss_of(row: Row) -> str:
    return f"{row['loss']:+.3f}"


def is_unequal(row: Row) -> bool:
    """Whether a row and the reference hold different bytes."""
    return is_known(row["bytes_apart"]) and abs(row["bytes_apart"]) > EQUAL


def decides(row: Row) -> bool:
    """Whether comparing a row with the reference says something: both hold equal bytes, or what holds less is clearly
    nearer to the full cache.
    """
    if not is_unequal(row):
        return True
    return bool(row["difference_high"] < 0 if row["bytes_apart"] < 0 else row["difference_low"] > 0)


def against(row: Row) -> str:
    """Bold where the interval leaves out 0, and bytes are equal or speak for the same side."""
    if not is_known(row["difference"]):
        return ""
    clear = row["difference_low"] > 0 or row["difference_high"] < 0
    mark = "**" if clear and decides(row) else ""
    held = f" at {row['bytes_apart']:+.0%} bytes" if is_unequal(row) else ""
    return f"{mark}{row['difference']:+.3g}{mark}{_between(row, 'difference', '{:+.3g}'.format)}{held}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "budget": budget_of,
    "method": lambda row: row["method"],
    "holds": held_of,
    "KL": kl_of,
    "median": lambda row: nats(row["kl_median"]),
    "99 %": lambda row: nats(row["kl_99"]),
    "largest": lambda row: nats(row["kl_max"]),
    "same token": lambda row: percent(row["same"]) + _between(row, "same", percent),
    "loss": lambda row: loss_of(row) + _between(row, "loss", "{:+.3f}".format),
    "against": against,
    "less/more": lambda row: f"{row['wins']:.0f}/{row['losses']:.0f}" if is_known(row["wins"]) else "",
    "at the end": lambda row: percent(row["end"]),
    "tokens/s": lambda row: rounded(row["tokens_per_second"]),
}


def guide(divergences: Divergences, mark: Mark) -> list[str]:
    reference = mark(divergences.reference)
    return [
        "**KL**: how far the next token's probabilities are from those of the full cache, KL(full || compressed) in "
        "nats, on the same tokens: the mean of the documents' means, with its 95 % interval by bootstrap over "
        "documents. **Median**, **99 %** and **largest** are over all tokens.",
        "**Same token**: how often both find the same token likeliest. **Loss**: of the text's own next token, beyond "
        "the full cache's.",
        f"**Against {reference}**: the difference in KL on the same documents at the same budget, with its 95 % "
        "interval by paired bootstrap; bold where that leaves out 0 and both hold equal bytes, or the nearer one less; "
        "beside it, the documents at which the method diverges less and more. Few documents make intervals too narrow.",
        "**Budget**: of the full cache's bytes at the end of a document. **Holds**: resident bytes at most, measured "
        f"behind every forward but the prompt's; how far that is from the budget, where it is over {100 * EQUAL:g} %: "
        "such a method cannot hold exactly so much. **At the end**: of the document, where a cache of windows may be "
        "at its emptiest.",
        "Tokens are forced, several in a forward, and kept or dropped as decoding them one by one would. This says how "
        "far a method moves the model, not whether it still solves a task.",
    ]
