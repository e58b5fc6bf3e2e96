"""The sweep over every causal LM: `check` on each class, in a process of its own, and the page made of the result.

python tests/support/sweep.py run [CLASS ...]     all classes, or some: docs/architectures.json, then the page
python tests/support/sweep.py show [CLASS ...]    prints rows, a line for each class, and writes nothing
python tests/support/sweep.py write-docs          docs/architectures.md from docs/architectures.json
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from support.architectures_page import page  # noqa: E402
from support.causal_lms import check, classes  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
RESULT, PAGE = DOCS / "architectures.json", DOCS / "architectures.md"
SECONDS = 300  # for one class


def _answer(name: str, pipe: Any) -> None:
    pipe.send(check(name))


def in_a_process(name: str) -> dict[str, Any]:
    """`check` of one class; where it crashes or hangs, a row that says so under "crash"."""
    context = multiprocessing.get_context("fork")  # everything is imported already
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    kind, model_type = classes()[name]
    row: dict[str, Any] = {"kind": kind, "model_type": model_type}
    try:
        row = ours.recv() if ours.poll(SECONDS) else row | {"crash": f"no answer in {SECONDS} s"}
    except EOFError:
        process.join()
        row["crash"] = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return row


def run(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each class with its row, printed as it comes."""
    for name in names:
        row = in_a_process(name)
        print(name, json.dumps(row), flush=True)
        yield name, row


def read() -> dict[str, Any]:
    """The committed result: "transformers" and "torch", the versions it is of, and "classes", a row by class name."""
    return json.loads(RESULT.read_text())


def write(rows: dict[str, Any]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    versions = f'"transformers": "{transformers.__version__}",\n"torch": "{torch.__version__.partition("+")[0]}"'
    versions += f',\n"left": {len(set(classes()) - set(rows))}'
    RESULT.write_text(f'{{\n{versions},\n"classes": {{\n{lines}\n}}\n}}\n')


def main(command: str = "", *names: str) -> None:
    if command == "show":
        for _ in run(names or classes()):
            pass
        return
    if command == "run":
        rows = read()["classes"] if names and RESULT.exists() else {}
        for name, row in run(names or classes()):
            rows[name] = row
            write(rows)  # each time: an interrupted sweep can go on with the classes that are left
    elif command != "write-docs" or names:
        raise SystemExit(__doc__)
    PAGE.write_text(page(read()))


if __name__ == "__main__":
    main(*sys.argv[1:])
