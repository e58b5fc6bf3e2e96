"""Files of text of every type."""

import json
import random
from pathlib import Path

from kara_hf.tasks.reasoner import VOCABULARY


def write_texts(path: Path) -> Path:
    """Files of every type in a folder that is there; each row or file of text is one document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    (path / "below").mkdir()

    def document():
        return " ".join(rng.choices(VOCABULARY, k=rng.randint(20, 60)))

    (path / "a.txt").write_text(document())
    (path / "below" / "b.md").write_text(document().replace(" ", "\n"))
    (path / "c.jsonl").write_text("\n".join(json.dumps({"text": document(), "n": n}) for n in range(5)) + "\n\n")
    (path / "d.json").write_text(json.dumps([{"text": document(), "other": [n]} for n in range(4)]))
    pq.write_table(pa.table({"text": [document() for _ in range(4)], "z": [1] * 4}), path / "e.parquet")
    (path / "f.csv").write_text("left,out")
    (path / "g.json").write_text(json.dumps({"text": document()}) + "\n" + json.dumps({"text": None}))
    return path


def documents(path: Path) -> list[str]:
    if path.suffix in (".txt", ".md"):
        return [path.read_text()]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path)["text"].to_pylist()
    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    return [row["text"] for row in rows if row["text"]]
