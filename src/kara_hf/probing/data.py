"""Token samples of one length, from text or from the problems of `kara_hf.tasks.reasoner`."""

import json
from collections.abc import Iterator
from itertools import count as count_from
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config import is_int, require
from ..needs import Check, Need, Package, check_needs, extra
from ..tasks.reasoner import TASKS, make_problem

if TYPE_CHECKING:
    from datasets import IterableDataset  # type: ignore[import-untyped]

PROBLEMS = "problems:"
SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
# Documents among which the next one is drawn when a stream is shuffled.
SHUFFLE_BUFFER = 1000


def token_samples(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int | None = None,
    split: str = "train",
    text_column: str = "text",
    seed: int | None = 0,
    skip: int = 0,
) -> Iterator[torch.Tensor]:
    """Yields samples ``[length]`` int64 on the CPU: documents, each with EOS behind it, packed without gaps.

    Equal arguments give equal samples, and a run that was cut off after n of them goes on with ``skip=n``. A tokenizer
    that puts a BOS first gets one at the beginning of every sample, since that is how the model always sees text.

    Args:
        data: where documents come from, read as a stream:
            a file: .txt, .md (one document each), .jsonl, .json or .parquet (one document in each row);
            a folder: all such files in it and below;
            a dataset of a hub: ``owner/name`` or ``owner/name:config``;
            ``problems:trace=0.5,fact=0.2,recall=0.3``: synthetic problems (`kara_hf.tasks.reasoner`) in these
            proportions, prompt and completion, as the bundled tiny reasoner was trained on. Every sample begins with a
            new problem that fills at least about half of it.
        tokenizer: of Transformers, with an EOS token.
        length: tokens in a sample.
        count: how many samples; the data must hold so many. None: without end, the data again and again, in another
            order each time.
        split: of a dataset of a hub, or of the problems ("train" or "test"); files have only "train".
        text_column: of .jsonl, .json, .parquet and datasets of a hub.
        seed: of the order; None: the order of the data. Of the problems: which ones, 0 for None.
        skip: samples left out at the beginning. They are read and tokenized again, except with problems.

    Raises:
        ValueError: an argument is not possible, or (when it shows) the data is too short or has no such column.
        FileNotFoundError: there are no such files.
        ImportError: `datasets` is not installed; problems do not need it.
    """
    require(is_int(length) and length >= 2, "length", length, "a whole number of tokens from 2 on")
    require(count is None or (is_int(count) and count >= 1), "count", count, "None or a whole number from 1 on")
    require(seed is None or (is_int(seed) and seed >= 0), "seed", seed, "None or a whole number from 0 on")
    require(is_int(skip) and skip >= 0, "skip", skip, "a whole number from 0 on")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to put behind each document; set tokenizer.eos_token")
    if str(data).startswith(PROBLEMS):
        mix = parse_mix(str(data), length)
        require(split in ("train", "test"), "split", split, "'train' or 'test' for problems")
        endless = (_problems(mix, tokenizer, length, split, seed or 0, index) for index in count_from(skip))
        return islice(endless, count)
    check_needs({"data": needs_of(str(data))[:1]})  # what reads it; files are looked up as they are opened
    dataset = _open(str(data), split, text_column)
    samples = _pack(dataset, tokenizer, length, text_column, seed, str(data), None if count is None else skip + count)
    return islice(samples, skip, None if count is None else skip + count)


def whole_documents(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    least: int | None = None,
    split: str = "train",
    text_column: str = "text",
) -> list[torch.Tensor]:
    """The first `count` documents with so many tokens, each cut to its first `length` ``[N]`` int64, in the order of
    the data. A tokenizer that puts a BOS first gets one.

    Args:
        data, split, text_column: as in `token_samples`; no problems.
        least: tokens from which on a document is taken; None: `length`.

    Raises:
        ValueError: there are not so many documents that long, or the data has no such column.
        FileNotFoundError: there are no such files.
        ImportError: `datasets` is not installed.
    """
    require(is_int(length) and length >= 2, "length", length, "a whole number of tokens from 2 on")
    require(is_int(count) and count >= 1, "count", count, "a whole number from 1 on")
    check_needs({"data": needs_of(str(data))[:1]})
    first, least = _beginning(tokenizer), length if least is None else least
    found: list[torch.Tensor] = []
    sizes: list[int] = []
    for row in _open(str(data), split, text_column):
        ids = first + _encode(tokenizer, _text(row, text_column, str(data)))
        sizes.append(len(ids))
        if len(ids) >= least:
            found.append(torch.tensor(ids[:length]))
            if len(found) == count:
                return found
    raise ValueError(
        f"data={str(data)!r} is too short: of its {len(sizes):,} documents {len(found):,} have {least:,} tokens, and "
        f"{count:,} are asked for; the longest has {max(sizes, default=0):,}"
    )


def parse_mix(data: str, length: int) -> dict[str, float]:
    """Reads "problems:task=weight,task=weight". Raises ValueError, also for a task that needs more than `length`."""
    mix = {}
    for part in data.removeprefix(PROBLEMS).split(","):
        name, _, weight = part.partition("=")
        try:
            mix[name.strip()] = float(weight)
        except ValueError:
            mix[name.strip()] = -1.0
    if not mix.keys() <= TASKS.keys() or min(mix.values()) < 0 or not 0 < sum(mix.values()) < float("inf"):
        raise ValueError(
            f"data={data!r} is not possible: write problems:TASK=WEIGHT,TASK=WEIGHT with tasks among "
            f"{', '.join(sorted(TASKS))} and weights from 0 on"
        )
    for name in mix:
        require(TASKS[name].min_length < length, "length", length, f"more than {TASKS[name].min_length} for {name!r}")
    return mix


def _problems(
    mix: dict[str, float], tokenizer: PreTrainedTokenizerBase, length: int, split: str, seed: int, index: int
) -> torch.Tensor:
    """The sample of that index, a function of its arguments alone."""
    rng = Random(f"problems/{seed}/{index}")
    ids = _beginning(tokenizer)
    for number in count_from():
        room = length - len(ids)
        if room <= 0:
            return torch.tensor(ids[:length])
        name = rng.choices(list(mix), list(mix.values()))[0]
        task = TASKS[name]
        wanted = min(max(round((room - 1) * rng.uniform(0.5, 1)), task.min_length), task.max_length)
        problem = make_problem(name, length=wanted, seed=(seed << 40) + (index << 12) + number, split=split)
        ids += _encode(tokenizer, f"{problem.prompt} {problem.completion}") + [tokenizer.eos_token_id]
    raise AssertionError


def needs_of(data: str) -> list[Need]:
    """What reading such data needs: a package and files, or nothing."""
    return [] if data.startswith(PROBLEMS) else [Package("datasets", extra("train")), Check(lambda: files_of(data))]


def files_of(data: str) -> list[Path]:
    """The files that such data is; none where it is a dataset of a hub.

    Raises:
        FileNotFoundError: there are no such files.
    """
    path = Path(data).expanduser()
    if not path.exists():
        if data[:1] in ("", ".", "/", "~") or path.suffix in SUFFIXES or data.count("/") > 1:
            raise FileNotFoundError(f"data={data!r} is not there; give a file, a folder or a dataset of a hub")
        return []
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise FileNotFoundError(f"data={data!r} has no file of text ({', '.join(SUFFIXES)})")
    return files


def _open(data: str, split: str, text_column: str) -> "IterableDataset":
    """The data as a stream of rows."""
    from datasets import IterableDataset, load_dataset

    files = files_of(data)
    if not files:
        name, _, config = data.partition(":")
        return load_dataset(name, config or None, split=split, streaming=True)
    require(split == "train", "split", split, "'train' for files, which have no other")
    return IterableDataset.from_generator(_rows, gen_kwargs={"files": files, "text_column": text_column})


def _rows(files: list[Path], text_column: str) -> Iterator[dict[str, Any]]:
    for file in files:
        if file.suffix in (".txt", ".md"):
            yield {text_column: file.read_text("utf-8")}
        elif file.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

            with ParquetFile(file) as table:
                columns = [text_column] if text_column in table.schema_arrow.names else None
                for batch in table.iter_batches(batch_size=SHUFFLE_BUFFER, columns=columns):
                    yield from batch.to_pylist()
        else:
            with file.open(encoding="utf-8") as lines:
                is_list = lines.read(1) == "["
                lines.seek(0)
                try:
                    yield from json.load(lines) if is_list else (json.loads(line) for line in lines if line.strip())
                except json.JSONDecodeError as error:
                    raise ValueError(f"{str(file)!r} is not JSON: neither a list nor an object in each line") from error


def _text(row: Any, text_column: str, data: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"data={data!r} has {type(row).__name__} where it should have objects with {text_column!r}")
    if text_column not in row:
        raise ValueError(
            f"text_column={text_column!r} is not possible: the rows of {data!r} have the columns {', '.join(row)}"
        )
    text = row[text_column]
    if not isinstance(text, str | None):
        raise ValueError(
            f"text_column={text_column!r} is not possible: it holds {type(text).__name__} in {data!r}, not text"
        )
    return text or ""


def _pack(
    dataset: "IterableDataset",
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str,
    seed: int | None,
    data: str,
    wanted: int | None,
) -> Iterator[torch.Tensor]:
    """All samples of one pass over the data, which must be `wanted` at least; for None of one pass after the other."""
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    first = _beginning(tokenizer)
    size, made, tokens = length - len(first), 0, 0
    ids: list[int] = []
    for epoch in count_from():
        dataset.set_epoch(epoch)  # another order
        for row in dataset:
            text = _text(row, text_column, data)
            if not text:
                continue
            document = _encode(tokenizer, text) + [tokenizer.eos_token_id]
            tokens += len(document)
            ids += document
            start = 0
            while len(ids) - start >= size:
                made += 1
                yield torch.tensor(first + ids[start : start + size])
                start += size
            del ids[:start]
        if made < (1 if wanted is None else wanted):
            raise ValueError(
                f"data={data!r} is too short: its {tokens:,} tokens are {made:,} samples of {length:,}, and "
                f"{wanted or 1:,} are asked for; give more data, or lower the number of samples or their length"
            )
        if wanted is not None:
            return


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of any text: its BOS, or nothing."""
    ids = tokenizer("")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] else []
