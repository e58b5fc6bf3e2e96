"""What can be said about scores of the same problems: intervals, paired differences, and the share of a gap closed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from scipy.stats import binomtest, bootstrap  # type: ignore[import-untyped]

GROUP = ["model", "weights", "task", "rule", "method", "budget", "equal"]  # a cell, whatever its seed
CONFIDENCE = 0.95
RESAMPLES = 9_999
BATCH = 500_000  # indices drawn at a time, which bounds memory


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, whose ends are NaN where one problem alone says nothing about them."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval is above or below 0, otherwise 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Comparison(Estimate):
    """A paired difference.

    Attributes:
        n: problems that both have.
        wins, losses, ties: of these, by which of both scores is higher.
    """

    n: int
    wins: int
    losses: int
    ties: int


def interval_of(scores: pd.Series) -> Estimate:
    """Mean score with its interval: Wilson's if every score is 0 or 1, otherwise by bootstrap over problems."""
    values = scores.to_numpy(dtype=float)
    if np.isin(values, (0.0, 1.0)).all():
        found = binomtest(int(values.sum()), len(values)).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(float(values.mean()), float(found.low), float(found.high))
    return _bootstrap(_mean, values)


def mean_interval(values: pd.Series) -> Estimate:
    """Mean with its interval by bootstrap, for values of any kind."""
    return _bootstrap(_mean, values.to_numpy(dtype=float))


def compare(mine: pd.Series, other: pd.Series) -> Comparison | None:
    """Mean of mine - other over the problems that both have, by paired bootstrap; None if there are none.

    Resampling the differences is resampling the pairs.

    Args:
        mine, other: scores by the number of the problem.
    """
    mine, other = (each.to_numpy(dtype=float) for each in mine.align(other, join="inner"))
    if not len(mine):
        return None
    found = _bootstrap(_mean, mine - other)
    wins, losses = int((mine > other).sum()), int((mine < other).sum())
    return Comparison(found.value, found.low, found.high, len(mine), wins, losses, len(mine) - wins - losses)


def gap_closed(scores: pd.Series, floor: pd.Series, ceiling: pd.Series) -> Estimate | None:
    """(scores - floor) / (ceiling - floor) of means over the problems that all have, by paired bootstrap.

    None if the ceiling is not above the floor by a whole interval: a share of nothing says nothing.
    """
    mine, low, high = pd.concat([scores, floor, ceiling], axis=1, join="inner").to_numpy(dtype=float).T
    if len(mine) < 2 or not _is_gap((high - low).tobytes()):
        return None
    return _bootstrap(_share, mine - low, high - low)


def summarise(
    frame: pd.DataFrame, reference: str = "random", *, floor: str = "random", ceiling: str = "oracle"
) -> pd.DataFrame:
    """One row per cell, as `GROUP` names it; scores of several seeds are averaged for each problem first.

    Columns, all of them shares where nothing else is said: n and seeds; score with low and high; difference to the
    reference with low, high, common (problems), wins, losses, ties; bytes_apart, by which it holds more than the
    reference; gap with low and high, the share of what lies between `floor` and `ceiling` that is closed; of what the
    full cache holds in the end: resident (most while decoding), held (mean over decode steps), peak (most at any
    moment), and each of these in bytes; allocated_bytes, what a GPU's allocator gave out at most; generated (tokens),
    evictable, how many of these were in windows that could be compressed; truncated, looped; tokens_per_second;
    solved_per_minute. What is not known is NaN.

    A cell is compared with the cells of the same model, task, rule, budget and kind of equality, or with a method
    to which no rule applies.

    Raises:
        ValueError: the reference was not measured.
    """
    methods = sorted(frame["method"].unique())
    if reference not in methods:
        raise ValueError(f"reference={reference!r} was not measured; choose one of {', '.join(methods)}")
    cells: dict[tuple[Any, ...], pd.DataFrame] = dict(iter(frame.groupby(GROUP)))
    scores = {key: cell.groupby("number")["score"].mean() for key, cell in cells.items()}
    unruled = {(*key[:3], key[4]): key for key in cells if key[3] == "none"}

    def beside(key: tuple[Any, ...], method: str) -> tuple[Any, ...] | None:
        same = (*key[:4], method, *key[5:])
        return same if same in cells else unruled.get((*key[:3], method))

    rows = []
    for key, cell in cells.items():
        row = dict(zip(GROUP, key, strict=True)) | _measures(cell) | {"n": len(scores[key])}
        row["score"], row["low"], row["high"] = _parts(interval_of(scores[key]))
        row |= dict.fromkeys(("common", "wins", "losses", "ties", "bytes_apart"), math.nan)
        other = beside(key, reference)
        found = compare(scores[key], scores[other]) if other is not None and other != key else None
        row["difference"], row["difference_low"], row["difference_high"] = _parts(found)
        if found:
            row |= {"common": found.n, "wins": found.wins, "losses": found.losses, "ties": found.ties}
        if found and other in cells and other[3] == key[3]:
            row["bytes_apart"] = row["resident_bytes"] / float(cells[other]["resident_bytes"].mean()) - 1
        ends = [scores[end] for method in (floor, ceiling) if (end := beside(key, method)) is not None]
        gap = gap_closed(scores[key], *ends) if len(ends) == 2 else None
        row["gap"], row["gap_low"], row["gap_high"] = _parts(gap)
        rows.append(row)
    return pd.DataFrame(rows)


def _mean(x: np.ndarray, axis: int = -1) -> Any:
    return x.mean(axis)


@lru_cache(maxsize=256)  # all methods of a table have the same ends
def _is_gap(differences: bytes) -> bool:
    return _bootstrap(_mean, np.frombuffer(differences)).sign > 0


def _share(closed: np.ndarray, gap: np.ndarray, axis: int = -1) -> Any:
    # Fewer than one resample in 40 has no gap; it belongs to the far end on its side, not to a division by 0.
    return closed.mean(axis) / np.maximum(gap.mean(axis), 1e-9)


def _bootstrap(statistic: Callable[..., Any], *samples: np.ndarray) -> Estimate:
    """Percentile interval over problems, from the same resamples for equal numbers of them."""
    n, value = len(samples[0]), float(statistic(*samples))
    if n < 2:
        return Estimate(value, math.nan, math.nan)
    found = bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH // n),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))


def _parts(estimate: Estimate | None) -> tuple[float, float, float]:
    return (estimate.value, estimate.low, estimate.high) if estimate else (math.nan,) * 3


def _measures(cell: pd.DataFrame) -> dict[str, Any]:
    """What was measured beside the scores."""
    sizes = {"resident": "resident_bytes", "held": "mean_bytes", "peak": "peak_bytes"}
    seconds = cell["seconds"].sum()
    return {
        "seeds": " ".join(map(str, sorted(cell["seed"].unique()))),
        **{name: float((cell[column] / cell["full_bytes"]).mean()) for name, column in sizes.items()},
        **{column: float(cell[column].mean()) for column in (*sizes.values(), "full_bytes", "allocated_bytes")},
        **{name: float(cell[name].mean()) for name in ("generated", "truncated", "looped")},
        "evictable": _evictable(cell),
        "tokens_per_second": cell["generated"].sum() / seconds if seconds else math.nan,
        "solved_per_minute": 60 * cell["score"].sum() / seconds if seconds else math.nan,
    }


def _evictable(cell: pd.DataFrame) -> float:
    """Of the tokens generated, those in whole windows when the answer ended."""
    shared = cell["settings"].iloc[0].get("shared")
    if shared is None:
        return math.nan
    stored = cell["generated"] - 1  # the last token never is
    return float((stored // shared["window"] * shared["window"]).sum() / cell["generated"].sum())
