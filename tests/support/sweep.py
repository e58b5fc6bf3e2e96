"""The sweep: `check` on every class, each in a process of its own, and the page that is made of the result.

    python tests/support/sweep.py run [CLASS ...]     all classes, or some; writes docs/architectures.json
    python tests/support/sweep.py docs                docs/architectures.md from it
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.causal_lms import check, classes  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs" / "architectures.json"
SECONDS = 120  # for one class


def _answer(name: str, pipe: Any) -> None:
    pipe.send(check(name))


def in_a_process(name: str) -> dict[str, Any]:
    """`check` of one class; a crash or a hang is a row that says so."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(name, theirs))
    process.start()
    theirs.close()
    kind, model_type = classes()[name]
    row: dict[str, Any] = {"kind": kind, "model_type": model_type}
    try:
        if ours.poll(SECONDS):
            row = ours.recv()
        else:
            row["crash"] = f"no answer in {SECONDS} s"
    except EOFError:
        process.join()
        row["crash"] = f"the process ended with {process.exitcode}"
    if process.is_alive():
        process.join(5)
        process.kill()
    process.join()
    return row


def run(names: list[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for number, name in enumerate(names):
        rows[name] = in_a_process(name)
        print(f"{number + 1}/{len(names)} {name}", json.dumps(rows[name]), flush=True)
    return rows


def main() -> None:
    chosen = sys.argv[2:]
    rows = run(chosen or list(classes()))
    old = json.loads(RESULT.read_text()) if RESULT.exists() and chosen else {}
    RESULT.write_text(json.dumps(dict(sorted((old | rows).items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
