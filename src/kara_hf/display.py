"""What the `kara-hf` command shows of its runs. Needs neither torch nor Transformers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Longest text shown in a cell of the table; of a longer one the end is shown.
TEXT_LIMIT = 300
STRIP_LINES = 3


@dataclass(frozen=True)
class Run:
    """One generation and what its cache held at the end.

    Attributes:
        name: of the cache.
        text: what was generated.
        new_tokens: how many tokens that is.
        decode_rate: tokens per second after the first, or None where there was no second.
        seen: tokens the model has processed: all but the last one generated.
        kept: tokens stored by each row (layer and KV head).
        nominal_bytes: keys and values of those tokens, and nothing else.
        resident_bytes: held at the end, by all layers.
        peak_bytes: most that was held at any moment, by all layers.
        rows: for each row its kept runs ``(start, end, kind)``; empty for a cache that keeps everything.
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
    nominal_bytes: int
    resident_bytes: int
    peak_bytes: int
    rows: Sequence[Sequence[tuple[int, int, str]]] = field(default_factory=tuple)
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
    "prompt": Look("prompt", "blue", "█", "P"),
    "sealed": Look("chunks", "green", "░▒▓", "-+*"),
    "open": Look("open", "yellow", "=", "="),
    "recent": Look("recent", "magenta", "#", "#"),
    "evicted": Look("evicted", "bright_black", "·", "."),
}
# A stretch of which a smaller share than this survives, averaged over rows, is drawn as evicted.
FAINT = 1 / 8


def show_runs(console: Console, runs: Sequence[Run], title: str) -> None:
    """Prints the runs side by side, and a strip for each cache that evicts."""
    console.print()
    console.print(Text(title, "bold"))
    console.print(_table(runs))
    for run in runs:
        if run.rows:
            show_strip(console, run)


def _table(runs: Sequence[Run]) -> Table:
    """One column for each run; bytes of the later ones also as a share of the first's."""
    caption = "resident: with free slots, tables and held queries; peak: with copies made to grow"
    table = Table(highlight=False, caption=caption, caption_justify="left")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    first = runs[0]
    graded = first.expected is not None
    table.add_row("answer" if graded else "text", *map(_verdict if graded else _ending, runs))
    table.add_row("tokens generated", *(f"{run.new_tokens:,}" for run in runs))
    table.add_row("tokens seen", *(f"{run.seen:,}" for run in runs))
    table.add_row("tokens kept per head", *map(_kept, runs))
    table.add_row("KV bytes of these", *(_bytes(run.nominal_bytes, first.nominal_bytes) for run in runs))
    table.add_row("resident KV bytes", *(_bytes(run.resident_bytes, first.resident_bytes) for run in runs))
    table.add_row("peak KV bytes", *(_bytes(run.peak_bytes, first.peak_bytes) for run in runs))
    table.add_row("decoded tokens/s", *("-" if run.decode_rate is None else f"{run.decode_rate:,.0f}" for run in runs))
    return table


def _verdict(run: Run) -> Text:
    answer = Text(run.answer or "(none)")
    if run.correct:
        return answer.append(" right", "bold green")
    return answer.append(f" wrong, it is {run.expected}", "bold red")


def _ending(run: Run) -> Text:
    text = run.text.strip()
    return Text(text if len(text) <= TEXT_LIMIT else f"[...] {text[-TEXT_LIMIT:]}", justify="left")


def _kept(run: Run) -> str:
    low, mean, high = min(run.kept), sum(run.kept) / len(run.kept), max(run.kept)
    share = f"{mean / run.seen:.0%}"
    return f"{low:,} ({share})" if low == high else f"{low:,} / {mean:,.0f} / {high:,} ({share})"


def _bytes(count: int, full: int) -> str:
    """A readable number of bytes, with its share of `full` where that is another."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    text = f"{size:,.0f} B" if units[0] == "B" else f"{size:,.1f} {units[0]}"
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


def show_strip(console: Console, run: Run) -> None:
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
