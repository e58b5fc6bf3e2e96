"""Results of an evaluation: the files that a run appends to, one table of all of them, and a packed form to keep."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from ...methods.rules import OLD_SPELLINGS


@dataclass(frozen=True)
class Cell:
    """What the examples of one file have in common.

    Attributes:
        model: name of the model.
        weights: which weights these were: a SHA-256 or a revision.
        task: name of the task, options included.
        rule: a key of `kara_hf.methods.rules.RULES`, or "none" where no rule applies, as for the full cache. Files that
            have an old spelling of it are read as if they had the new one.
        method: name of the method.
        budget: share of the tokens that is kept, nominally.
        equal: "bytes" (all methods hold the resident bytes of one of them) or "tokens" (all keep the same share).
        seed: of what is random in the method.
    """

    model: str
    weights: str
    task: str
    rule: str
    method: str
    budget: float
    equal: str
    seed: int

    @property
    def stem(self) -> Path:
        """Path of its files below the folder of all results, up to the process."""
        tokens = "-tokens" if self.equal == "tokens" else ""
        name = f"{_safe(self.method)}@{self.budget:.12g}{tokens}-seed{self.seed}"
        return Path(_safe(self.model), _safe(self.task), _safe(self.rule), name)


CELL = [field.name for field in fields(Cell)]
# What is kept of each example: its name in a line of a file, and how it is read from text.
EXAMPLE: dict[str, type] = {
    "number": int,
    "score": float,
    "generated": int,
    "truncated": bool,
    "looped": bool,
    "distance": float,  # NaN: there is none
    "prompt": int,
    "mean_bytes": float,
    "resident_bytes": int,
    "peak_bytes": int,
    "allocated_bytes": float,  # NaN: not on a GPU, or measured before it was noted
    "full_bytes": int,
    "seconds": float,
}
TEXT = "text"  # kept in the files of a run, not in packed ones


@dataclass(frozen=True)
class Lines:
    """What the lines of a file hold behind its header.

    Attributes:
        kinds: their fields, with what they are; one of them is ``number``.
        unknown: of these, numbers that may be null.
        text: a further field, or "".
        suffix: of the files.
    """

    kinds: dict[str, type]
    unknown: tuple[str, ...] = ()
    text: str = ""
    suffix: str = ".jsonl"

    @property
    def names(self) -> list[str]:
        return [*self.kinds, *([self.text] if self.text else [])]

    def check(self, line: Any) -> dict[str, Any]:
        """Raises ValueError if a line has other fields, or a value of the wrong kind."""
        if isinstance(line, dict) and "allocated_bytes" in self.unknown:
            line = {"allocated_bytes": None} | line
        if not isinstance(line, dict) or line.keys() != set(self.names):
            raise ValueError(f"its fields are not those of an example, {', '.join(self.names)}")
        for name, kind in self.kinds.items():
            value = line[name]
            known = {int, float} if kind is float else {kind}
            if type(value) not in known and not (name in self.unknown and value is None):
                raise ValueError(f"{name}={value!r} is of the wrong kind: it must be {kind.__name__}")
        return line


ANSWERS = Lines(EXAMPLE, unknown=("distance", "allocated_bytes"), text=TEXT)
SOURCE = ["settings", "provenance"]


class CellFile:
    """Appends the examples of a cell to a file, so that a run that was stopped goes on where it was.

    Opening creates the file, or drops the last line of one that was torn when its process was stopped.

    Args:
        folder: of all results.
        settings: of the method, the model and the run, which all parts of a cell share: whatever could change the
            numbers. A file with others is not added to.
        provenance: where this part comes from.
        process: rank of the process that writes; each has a file of its own.
        lines: what its lines hold.

    Attributes:
        path: the file.
        done: numbers of the examples that any file of this cell holds.

    Raises:
        ValueError: a file of this cell is of another cell or has other settings, or is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        cell: Cell,
        settings: dict[str, Any],
        provenance: dict[str, Any],
        process: int = 0,
        lines: Lines = ANSWERS,
    ):
        self.lines = lines
        header = {"cell": asdict(cell), "settings": settings, "provenance": provenance}
        text = json.dumps(header, allow_nan=False)
        stem = Path(folder) / cell.stem
        self.path = stem.with_name(f"{stem.name}.{process}{lines.suffix}")
        self.done: set[int] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rules = [cell.rule, *(old for old, new in OLD_SPELLINGS.items() if new == cell.rule)]
        near = [path for rule in rules for path in (stem.parent.with_name(_safe(rule))).glob(f"*{lines.suffix}")]
        parts = [path for path in near if re.fullmatch(re.escape(stem.name) + r"\.\d+", path.stem)]
        for path in sorted(parts):
            found, size = read_lines(path, self.lines)
            if path == self.path:
                os.truncate(path, size)
            if found:
                _require_same(path, found[0], json.loads(text))
                self.done.update(line["number"] for line in found[1:])
        if not self.path.exists() or not self.path.stat().st_size:
            self._write(text + "\n")

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Writes one line per example; they are on the disk when this returns.

        Raises:
            ValueError: a line has other fields than it should, or a value of the wrong kind.
        """
        for line in lines:
            self.lines.check(line)
        self._write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        self.done.update(line["number"] for line in lines)

    def held(self) -> list[dict[str, Any]]:
        """The lines of this file, without its header."""
        return read_lines(self.path, self.lines)[0][1:]

    def _write(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def load(path: str | Path, lines: Lines = ANSWERS) -> pd.DataFrame:
    """All examples of a folder of result files, of one such file, or of a packed file, one per row.

    Columns are the fields of `Cell` and of `EXAMPLE`, the text unless the file is packed, and settings and provenance
    as dictionaries. An example that several files of a cell hold counts once. `lines` says what files hold that are of
    another kind; these are not packed.

    Raises:
        ValueError: there are no examples, a line is damaged, or files of one cell have different settings.
        OSError: there is no such file.
    """
    path = Path(path)
    packed = path.is_file() and path.suffix != lines.suffix
    if packed:
        tables = [_unpack(row, f"{path}, row {i}") for i, row in enumerate(_parse(_text(path), str(path)))]
    else:
        files = sorted(path.rglob(f"*{lines.suffix}")) if path.is_dir() else [path]
        tables = [_table(file, found, lines) for file in files if len(found := read_lines(file, lines)[0]) > 1]
    if not tables:
        raise ValueError(f"there are no results in {path}; `kara-hf evaluate` writes them")
    frame = pd.concat(tables, ignore_index=True)
    for key, settings in frame.groupby(CELL, sort=False)["settings"]:
        first = settings.iloc[0]
        if any(other is not first and other != first for other in settings):
            raise ValueError(f"files in {path} have different settings for {dict(zip(CELL, key, strict=True))}")
    frame = frame.drop_duplicates([*CELL, "number"])
    return frame.sort_values([*CELL, "number"], kind="stable", ignore_index=True)


def stored_settings(folder: str | Path, cell: Cell, lines: Lines = ANSWERS) -> dict[str, Any] | None:
    """The settings that the file of a cell has, written by the first process; None where there is no such file.

    Raises:
        ValueError: a line of it is damaged.
    """
    stem = Path(folder) / cell.stem
    path = stem.with_name(f"{stem.name}.0{lines.suffix}")
    found = read_lines(path, lines)[0] if path.exists() else []
    return found[0]["settings"] if found else None


def pack(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows without texts: one for each cell and provenance, in which every field of its examples is one string.

    `load` reads them from a file as they were; seconds are rounded to six digits.
    """
    source = frame["provenance"].map(_key)
    rows = []
    for key, group in frame.groupby([*CELL, source.rename("source")], sort=True):
        group = group.sort_values("number")
        rows.append(
            {
                "cell": asdict(_cell(dict(zip(CELL, key, strict=False)))),
                "settings": group["settings"].iloc[0],
                "provenance": group["provenance"].iloc[0],
                "examples": {name: " ".join(map(_short(name), group[name])) for name in EXAMPLE},
            }
        )
    return rows


def save_packed(frame: pd.DataFrame, path: str | Path) -> None:
    """Writes what `pack` makes of it, one row per line; gzipped where the path ends so."""
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in pack(frame))
    text = f"[\n{lines}\n]\n".encode()
    Path(path).write_bytes(gzip.compress(text, mtime=0) if Path(path).suffix == ".gz" else text)


def _text(path: Path) -> str:
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()


def _safe(name: str) -> str:
    """A name that a file may have. Long ones are cut, with a checksum behind them."""
    safe = re.sub(r"[^\w.=,+-]+", "_", name).strip(".") or "_"
    return safe if len(safe) <= 100 else f"{safe[:90]}-{zlib.crc32(name.encode()):08x}"


def read_lines(path: Path, kind: Lines = ANSWERS) -> tuple[list[dict[str, Any]], int]:
    """The header and the whole lines of a file, and their size in bytes; a last line that was torn is left out.

    Raises:
        ValueError: a line is damaged.
    """
    lines: list[dict[str, Any]] = []
    size, raw = 0, path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(raw, 1):
        last = number == len(raw)
        if last and not line.endswith(b"\n"):
            break
        try:
            found = json.loads(line)
            lines.append(kind.check(found) if number > 1 else _check_header(found))
        except ValueError as error:
            if last and isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                break
            raise ValueError(f"{path}, line {number} is damaged: {error}; remove the line or the file") from error
        size += len(line)
    return lines, size


def _check_header(line: Any) -> dict[str, Any]:
    if not isinstance(line, dict) or line.keys() != {"cell", *SOURCE}:
        raise ValueError(f"its fields are not those of a header, {', '.join(['cell', *SOURCE])}")
    return line | {"cell": asdict(_cell(line["cell"]))}


def _cell(entries: dict[str, Any]) -> Cell:
    if not isinstance(entries, dict) or entries.keys() != set(CELL):
        raise ValueError(f"a cell must have the fields {', '.join(CELL)}")
    entries = entries | {"rule": OLD_SPELLINGS.get(entries["rule"], entries["rule"])}
    try:
        return Cell(**{field.name: field.type(entries[field.name]) for field in fields(Cell)})  # type: ignore[operator]
    except TypeError as error:
        raise ValueError(f"a cell has a value of the wrong kind: {error}") from error


def _require_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError unless both headers are of the same cell and settings."""
    apart = [
        f"{part} {name}: {found[part].get(name)!r} there, {wanted[part].get(name)!r} now"
        for part in ("cell", "settings")
        for name in sorted(found[part].keys() | wanted[part].keys())
        if found[part].get(name) != wanted[part].get(name)
    ]
    if apart:
        raise ValueError(
            f"{path} holds results of another setting ({'; '.join(apart)}); choose another folder, or remove the file "
            "to measure again"
        )


def _table(path: Path, found: list[dict[str, Any]], lines: Lines) -> pd.DataFrame:
    header, *examples = found
    table = pd.DataFrame.from_records(examples, columns=lines.names)
    return _complete(table, header, str(path), lines)


def _unpack(row: Any, place: str) -> pd.DataFrame:
    if not isinstance(row, dict) or row.keys() != {"cell", *SOURCE, "examples"}:
        raise ValueError(f"{place} is no row of packed results")
    found = {name: text.split() for name, text in row["examples"].items()}
    found.setdefault("allocated_bytes", ["nan"] * len(found["number"]))
    examples: dict[str, Any] = {name: found[name] for name in EXAMPLE}
    if len({len(values) for values in examples.values()}) != 1:
        raise ValueError(f"{place} has not the same number of values in every field of its examples")
    for name in ("truncated", "looped"):
        examples[name] = [text == "1" for text in examples[name]]
    return _complete(pd.DataFrame(examples), row, place)


def _complete(table: pd.DataFrame, header: dict[str, Any], place: str, lines: Lines = ANSWERS) -> pd.DataFrame:
    """Examples with their types, behind the fields of their cell; settings and provenance are shared, not copied."""
    try:
        table = table.astype(lines.kinds)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place} has a value that cannot be read: {error}") from error
    for i, (name, value) in enumerate(asdict(_cell(header["cell"])).items()):
        table.insert(i, name, value)
    for name in SOURCE:
        table[name] = [header[name]] * len(table)
    return table


def _short(name: str) -> Any:
    """How a field is written in a packed file: whole numbers without a point, booleans as 0 and 1."""
    if EXAMPLE[name] is not float:
        return lambda value: str(int(value))
    if name == "seconds":
        return lambda value: f"{value:.6g}"
    return lambda value: repr(float(value)).removesuffix(".0")


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _parse(text: str, place: str) -> Iterable[Any]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{place} holds no list of packed results")
    return rows
