"""What the `kara-hf` command shows of its runs. Needs neither torch nor Transformers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..cache.report import CacheReport

# Longest text shown in a cell of the table; of a longer one the end is shown.
TEXT_LIMIT = 300
STRIP_LINES = 3


@dataclass(frozen=True)
class CacheRun:
    """One generation and what its cache held at the end.

    Attributes:
        name: of the cache.
        text: what was generated.
        new_tokens: how many tokens that is.
        decode_rate: tokens per second after the first, or None where there was no second.
        seen: tokens the model has processed: all but the last one generated.
        kept: tokens stored by each row (layer and KV head).
        full_bytes: what the full cache holds for the tokens seen.
        nominal_bytes: keys and values of the tokens kept, and nothing else.
        resident_bytes: held at the end, by all layers.
        peak_bytes: most that was held at any moment, by all layers.
        rows: for each row its kept runs ``(start, end, kind)``; empty for a cache that keeps everything.
        report: the cache's own account, or None for one that gives none.
        settings: what the cache was made with, in words; empty where there is nothing to say.
        answer: final answer found in the text, or None where no answer is known.
        expected: the right answer, or None where it is not known.
        correct: whether the answer is right, or None where that is not known.
    """

    name: str
    text: str
    new_tokens: int
    decode_rate: float | None
    seen: int
    kept: Sequence[int]
    full_bytes: int
    nominal_bytes: int
    resident_bytes: int
    peak_bytes: int
    rows: Sequence[Sequence[tuple[int, int, str]]] = field(default_factory=tuple)
    report: "CacheReport | None" = None
    settings: str = ""
    answer: str | None = None
    expected: str | None = None
    correct: bool | None = None


@dataclass(frozen=True)
class Look:
    """How a kind of token is drawn: `glyphs` by rising share of rows that keep it, so that colour is not needed."""

    label: str
    style: str
    glyphs: str
    ascii: str


LOOKS = {
    "pinned": Look("pinned", "cyan", "█", "@"),
    "prompt": Look("prompt", "blue", "█", "P"),
    "sealed": Look("survived", "green", "░▒▓", "-+*"),
    "open": Look("open", "yellow", "=", "="),
    "recent": Look("recent", "magenta", "#", "#"),
    "evicted": Look("evicted", "bright_black", "·", "."),
}
# A stretch of which a smaller share than this survives, averaged over rows, is drawn as evicted.
FAINT = 1 / 8
# From few to many (viridis, which colour-blind eyes can order too), and the text colour that is readable on each.
RAMP = (
    ("#440154", "#ffffff"),
    ("#472d7b", "#ffffff"),
    ("#3b528b", "#ffffff"),
    ("#2c728e", "#ffffff"),
    ("#21918c", "#000000"),
    ("#28ae80", "#000000"),
    ("#5ec962", "#000000"),
    ("#addc30", "#000000"),
    ("#fde725", "#000000"),
)


def show_runs(console: Console, runs: Sequence[CacheRun], title: str) -> None:
    """Prints the runs side by side, and for each cache that evicts what survived: by position, and by KV head."""
    console.print()
    console.print(Text(title, "bold"))
    for run in runs:
        if run.settings:
            console.print(Text(f"{run.name}: {run.settings}"))
    console.print(_table(runs))
    for run in runs:
        if run.rows:
            show_strip(console, run)
        if run.report is not None and _ragged(run):
            console.print(f"Tokens that each KV head of {run.name} kept:")
            console.print(kept_table(run.report, width=console.width))


def _table(runs: Sequence[CacheRun]) -> Table:
    """One column for each run."""
    caption = (
        "%: of the full cache after the same tokens; resident: with free slots, tables and held queries; peak: with "
        "copies made to grow"
    )
    table = Table(highlight=False, caption=caption, caption_justify="left")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    graded = runs[0].expected is not None
    table.add_row("answer" if graded else "text", *map(_verdict if graded else _ending, runs))
    table.add_row("tokens generated", *(f"{run.new_tokens:,}" for run in runs))
    table.add_row("tokens seen", *(f"{run.seen:,}" for run in runs))
    table.add_row("tokens kept per head", *map(_kept, runs))
    if any(map(_ragged, runs)):
        table.add_row("  least to most", *(f"{min(run.kept):,} to {max(run.kept):,}" for run in runs))
    table.add_row("KV bytes of these", *(_bytes(run.nominal_bytes, run.full_bytes) for run in runs))
    table.add_row("resident KV bytes", *(_bytes(run.resident_bytes, run.full_bytes) for run in runs))
    table.add_row("peak KV bytes", *(_bytes(run.peak_bytes, run.full_bytes) for run in runs))
    table.add_row("decoded tokens/s", *("-" if run.decode_rate is None else f"{run.decode_rate:,.0f}" for run in runs))
    return table


def _verdict(run: CacheRun) -> Text:
    answer = Text(run.answer or "(none)")
    if run.correct:
        return answer.append(" right", "bold green")
    return answer.append(f" wrong, it is {run.expected}", "bold red")


def _ending(run: CacheRun) -> Text:
    text = run.text.strip()
    return Text(text if len(text) <= TEXT_LIMIT else f"[...] {text[-TEXT_LIMIT:]}", justify="left")


def _ragged(run: CacheRun) -> bool:
    """Whether heads keep different numbers of tokens."""
    return min(run.kept) < max(run.kept)


def _kept(run: CacheRun) -> str:
    """The mean over heads, with its share of the tokens seen."""
    mean = sum(run.kept) / len(run.kept)
    return f"{mean:,.0f} ({mean / run.seen:.0%})"


def readable_bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:,.0f} B" if units[0] == "B" else f"{size:,.1f} {units[0]}"


def _bytes(count: int, full: int) -> str:
    """A readable number of bytes, with its share of `full` where that is another number."""
    text = readable_bytes(count)
    return text if full in (0, count) else f"{text} ({count / full:.0%})"


def survival(rows: Sequence[Sequence[tuple[int, int, str]]], seen: int) -> dict[str, list[float]]:
    """For each kind the share of `rows` that keep a position as that kind, for positions 0 to `seen`."""
    changes = {kind: [0] * (seen + 1) for kind in LOOKS if kind != "evicted"}
    for row in rows:
        for start, end, kind in row:
            changes[kind][start] += 1
            changes[kind][end] -= 1
    shares: dict[str, list[float]] = {}
    for kind, change in changes.items():
        level, shares[kind] = 0, []
        for step in change[:seen]:
            level += step
            shares[kind].append(level / len(rows))
    return shares


def show_strip(console: Console, run: CacheRun) -> None:
    """Prints the sequence as cells, oldest first: what most of the cell survived as, darker where more rows keep it."""
    shares = survival(run.rows, run.seen)
    stretch = -(-run.seen // (STRIP_LINES * console.width))
    plain = console.options.ascii_only
    strip, legend = Text(), Text()
    for start in range(0, run.seen, stretch):
        mean = {kind: sum(cells := share[start : start + stretch]) / len(cells) for kind, share in shares.items()}
        kind = max(mean, key=mean.__getitem__)
        look = LOOKS[kind if mean[kind] >= FAINT else "evicted"]
        glyphs = look.ascii if plain else look.glyphs
        strip.append(glyphs[min(int(mean[kind] * len(glyphs)), len(glyphs) - 1)], look.style)
    counts = {kind: sum(share) for kind, share in shares.items()}
    counts["evicted"] = run.seen - sum(counts.values())
    for kind, look in LOOKS.items():
        if counts[kind] >= 0.5:
            glyphs = look.ascii if plain else look.glyphs
            legend.append(glyphs, look.style).append(f" {look.label} {counts[kind]:,.0f}   ")
    cell = "one token" if stretch == 1 else f"{stretch} tokens"
    console.print(f"What {run.name} kept, mean of {len(run.rows)} KV heads; a cell is {cell}, oldest first:")
    console.print(strip, overflow="fold")
    console.print(legend)


def kept_table(report: "CacheReport", sequence: int = 0, *, width: int = 100, height: int = 40) -> Table:
    """How many tokens each KV head (column) of each compressed layer (row) keeps of one sequence, as a heat map.

    Where there are more layers or heads than fit, a cell is the mean of several neighbours, which the caption says.

    Args:
        report: of a cache.
        sequence: which one of the batch.
        width: columns of the terminal that the table may take.
        height: rows of numbers that the table may have.

    Returns:
        A table for `rich.console.Console.print`; brighter is more, between the least and the most in the table. Heads
        that a layer does not have are blank. The last column is the layer's mean.

    Raises:
        IndexError: there is no such sequence.
    """
    sequences = report.kept.shape[1]
    if not 0 <= sequence < sequences:
        raise IndexError(f"sequence {sequence} is not there; the report has {sequences}")
    kept: list[list[int]] = report.kept[:, sequence].tolist()
    digits = len(f"{max(max(row) for row in kept):,}")
    cell, label = max(digits, len("head 0")) + 2, max(len("layer"), 2 * len(str(report.layers[-1])) + 1) + 2
    layers = _bands(len(kept), height)
    heads = _bands(len(kept[0]), max(1, (width - label) // cell - 1))
    means = [[_mean([kept[i][head] for i in band for head in part]) for part in heads] for band in layers]
    shown = [mean for row in means for mean in row if mean is not None]
    caption = f"of {int(report.seen[sequence]):,} seen"
    if len(layers) < len(kept) or len(heads) < len(kept[0]):
        caption += f"; a cell is the mean of up to {len(layers[0])} x {len(heads[0])} (layers x heads)"
    table = Table(box=None, padding=0, collapse_padding=True, highlight=False, caption=caption, caption_justify="left")
    table.add_column("layer ".rjust(label), no_wrap=True)
    for part in heads:
        table.add_column(f"{'head ' if len(part) == 1 else ''}{_span(part)} ".rjust(cell), no_wrap=True)
    table.add_column("mean".rjust(cell), no_wrap=True)
    for band, row in zip(layers, means, strict=True):
        heat = (_heat(value, min(shown), max(shown), cell) for value in row)
        mean = _mean([count for i in band for count in kept[i]])
        name = f"{_span([report.layers[i] for i in band])} "
        table.add_row(name.rjust(label), *heat, f"{mean or 0:,.0f}".rjust(cell))
    return table


def _bands(count: int, most: int) -> list[range]:
    """The numbers below `count` in at most `most` runs of equal length, of which the last may be shorter."""
    size = -(-count // most)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _mean(counts: Sequence[int]) -> float | None:
    """Mean of the counts that are not 0, which stands for a head that is not there; None without any."""
    there = [count for count in counts if count]
    return sum(there) / len(there) if there else None


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _heat(value: float | None, least: float, most: float, width: int) -> Text:
    """A number on a colour between those for `least` and `most`."""
    if value is None:
        return Text(" " * width)
    share = (value - least) / (most - least) if most > least else 0.5
    background, foreground = RAMP[round(share * (len(RAMP) - 1))]
    return Text(f"{value:,.0f} ".rjust(width), f"{foreground} on {background}")
