"""Fits pages that are read in the repository as well into the site: a hook of mkdocs.

The README is the site's first page and CONTRIBUTING.md its design; links to files that the site
does not hold become plain text.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"index.md": ROOT / "README.md", "design.md": ROOT / "CONTRIBUTING.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of docs/."""
    for name, path in PAGES.items():
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: object) -> str:
    """Turns links between the repository's files into links between the site's."""
    here = PAGES.get(page.file.src_uri, ROOT / "docs" / page.file.src_uri).parent
    homes = {path: name for name, path in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        file, hash_, anchor = target.partition("#")
        path = (here / file).resolve()
        name = homes.get(path)
        if name is None and path.is_relative_to(ROOT / "docs"):
            name = path.relative_to(ROOT / "docs").as_posix()
        held = files.get_file_from_path(name or "")
        if held is None or held.inclusion.is_excluded():
            return text
        up = "../" * page.file.src_uri.count("/")
        return f"[{text}]({up}{name}{hash_}{anchor})"

    return LINK.sub(link, markdown)
