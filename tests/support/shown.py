"""The texts that are shown to users, and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
AT_THE_ROOT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in [*AT_THE_ROOT, *sorted(ROOT.glob("docs/*.md"))]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)


def shown(command: str) -> list[tuple[str, str]]:
    """All lines of code in all texts that begin with `command`, with the text that they are in."""
    found = []
    for name, text in TEXTS.items():
        code = [match[1] for match in re.finditer(r"`([^`\n]+)`", FENCE.sub("", text))]
        code += [line.strip() for line in text.splitlines() if line.startswith("    ")]
        code += [line.strip() for _, block in FENCE.findall(text) for line in block.splitlines()]
        found += [(name, line) for line in code if line.startswith(command + " ")]
    return found


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)
