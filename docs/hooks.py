"""What the site has beside docs/: the pages at the root. Links are written as GitHub follows them, and led on here."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {  # of the site, with what each is in the repository
    "index.md": "README.md",
    "pages.md": "docs/index.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files, *, config):
    files.remove(files.get_file_from_path("index.md"))
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, *, page, **_):
    here = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    sources = {source: name for name, source in PAGES.items()}

    def led_on(match):
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        return match[1] if "://" in match[1] else sources.get(there, there.removeprefix("docs/"))

    return LINK.sub(led_on, markdown)
