"""Links from pages to files of the repository, and diagrams that follow the page's colours.

A hook of mkdocs (see `mkdocs.yml`). A page links to code by its path, `[text](../gptjax/train.py)`,
which works where the repository is browsed; here the path is checked, and becomes a link to the
public repository. An image `![text](../img/name.svg)` is put into the page itself, so that its
lines and letters have the colour of the page's text, in the light and in the dark scheme. Pictures
of `experiments/` are copied.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/gptjax/gptjax"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)#\s]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"(!\[[^\]]*\])\((\.\./(?:\.\./)*experiments/[^)\s]+)\)")
DIAGRAM = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+\.svg)\)$", re.M)

log = logging.getLogger("mkdocs.hooks.links")  # a warning here fails `mkdocs build --strict`


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this with all files of the documentation, before it reads any."""
    from mkdocs.structure.files import File

    for picture in sorted((ROOT / "experiments").glob("*.png")):
        files.append(File.generated(config, f"img/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs calls this with the text of each page."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return match.group()  # a page: mkdocs checks it
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which is not in the repository", page.file.src_uri, path)
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{text}]({REPOSITORY}/{kind}/main/{path}{anchor or ''})"

    def draw(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = ROOT / posixpath.normpath(posixpath.join(folder, target))
        if not path.is_file():
            log.warning("%s shows %s, which does not exist", page.file.src_uri, target)
            return match.group()
        svg = re.sub(r"<style>.*?</style>\n?", "", path.read_text(encoding="utf-8"), flags=re.S)
        label = text.replace('"', "&quot;")
        return svg.replace("<svg ", f'<svg class="diagram" role="img" aria-label="{label}" ', 1)

    def copied(match: re.Match[str]) -> str:
        name = posixpath.basename(match.group(2))
        up = posixpath.relpath("docs/img", folder)
        return f"{match.group(1)}({up}/{name})"

    return DIAGRAM.sub(draw, LINK.sub(link, PICTURE.sub(copied, markdown)))
