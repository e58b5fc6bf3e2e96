"""Tables of rows: formats over what a row holds, and where the numbers come from."""

from collections.abc import Sequence

from .rows import Row

# What stands above a column, and a format over the row. Bytes may also be had as MB (1e6) and GiB.
Columns = Sequence[tuple[str, str]]
NONE = "–"
GIB = 2**30


def markdown(title: str, rows: Sequence[Row], columns: Columns) -> str:
    """A title, where the rows come from, and a line for each; one without numbers says why."""
    return f"**{title}** {origin_of(rows)}\n\n{table(rows, columns)}"


def table(rows: Sequence[Row], columns: Columns) -> str:
    """A line for every row."""
    lines = [[head for head, _ in columns], ["---"] * len(columns)]
    for row in rows:
        values = derived(row)
        cells = [cell(form, values) for _, form in columns]
        if row.get("status", "measured") in ("failed", "skipped", "not reached"):
            cells[-1] = f"{row['status']}: {row.get('reason', '')}"
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(form: str, values: Row) -> str:
    """A row's values in a format; a dash where one is not there."""
    try:
        return form.format_map(values)
    except KeyError:
        return NONE


def derived(row: Row) -> Row:
    """The row with what tables show and nobody stores: other units, shares of the nominal and of the full bytes, words
    for booleans.
    """
    sizes = {name.removesuffix("_bytes"): value for name, value in row.items() if name.endswith("_bytes")}
    more: Row = {f"{name}_mb": size / 1e6 for name, size in sizes.items()}
    more |= {f"{name}_gib": size / GIB for name, size in sizes.items()}
    for whole in ("nominal", "full"):
        if sizes.get(whole):
            more |= {f"{name}_of_{whole}": size / sizes[whole] for name, size in sizes.items() if name != whole}
    words = {name: "yes" if value else "no" for name, value in row.items() if isinstance(value, bool)}
    return row | more | words


def origin_of(rows: Sequence[Row]) -> str:
    """Commands, hardware, versions and dates of rows."""
    found = {}
    for row in rows:
        source = row["provenance"]
        versions = ", ".join(f"{name} {number}" for name, number in source["versions"].items())
        threads = f"{source['threads']} thread{'s' if source['threads'] > 1 else ''}"
        where = f"{source['device']}, {threads}, {versions}, {row['dtype']}, {source['date']}"
        found[f"`{source['command']}`: {where}"] = None
    return "; ".join(found) + "."
