"""How do pages link to files of the repository that lie outside docs/?

They use the path in a clone, such as `../benchmarks/scaling.md`. For the site this hook copies such files, and the
files that they link to, to `repository/`, and rewrites the links.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")
_PLACE = PurePosixPath("repository")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to, directly or through another such file."""
    root = Path(config["docs_dir"]).parent
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    added: set[Path] = set()
    while pages:
        for target in _targets(pages.pop()):
            if target in added or target.is_relative_to(config["docs_dir"]) or not target.is_relative_to(root):
                continue
            added.add(target)
            place = str(_PLACE / target.relative_to(root).as_posix())
            files.append(File.generated(config, place, abs_src_path=str(target)))
            if target.suffix == ".md":
                pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links that leave docs/ to the copies."""
    docs = Path(config["docs_dir"])
    here = PurePosixPath(page.file.src_uri).parent
    if here.is_relative_to(_PLACE):
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        target = (docs / here / match[1]).resolve()
        if target.is_relative_to(docs) or not target.is_file():
            return match[0]
        up = "../" * len(here.parts)
        return f"]({up}{_PLACE}/{target.relative_to(docs.parent).as_posix()}{match[2] or ''})"

    return _LINK.sub(rewritten, markdown)


def _targets(page: Path) -> list[Path]:
    """The existing files that a Markdown file links to."""
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    return [target for link, _ in links if (target := (page.parent / link).resolve()).is_file()]
