"""Hooks of mkdocs: they add pages outside docs/ to the site, and make links work there as they do on a code host.

A link may lead to any file of the project. Pages in PAGES are linked as pages; other files are copied into the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # in the project: in the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "benchmarks/results.md",
    "benchmarks/iconabc/README.md": "benchmarks/iconabc.md",
    "examples/node/README.md": "examples/node.md",
}
SOURCE = {site: project for project, site in PAGES.items()}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
PICTURES = (".svg", ".png", ".webp")


def on_files(files: Any, config: Any) -> Any:
    for project, site in PAGES.items():
        files.append(File.generated(config, site, content=(ROOT / project).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        for _, link, _, _ in LINK.findall(file.content_string):
            path = linked(file.src_uri, link)
            if (
                path
                and path not in PAGES
                and not path.startswith("docs/")
                and not files.get_file_from_path(copied(path))
            ):
                files.append(File.generated(config, copied(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return LINK.sub(lambda link: relinked(page.file.src_uri, link), markdown)


def relinked(site: str, link: re.Match) -> str:
    path = linked(site, link[2])
    if path is None:
        return link[0]
    target = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else copied(path))
    relative = os.path.relpath(target, PurePosixPath(site).parent)
    return f"{link[1]}{relative}{link[3] or ''}{link[4]}"


def linked(site: str, link: str) -> str | None:
    """The project file that a link on a page of the site leads to; None for other addresses, which mkdocs checks."""
    page = SOURCE.get(site, f"docs/{site}")
    path = PurePosixPath(os.path.normpath(PurePosixPath(page).parent / link))
    if (ROOT / path / "README.md").is_file():
        path /= "README.md"
    return str(path) if ".." not in path.parts and (ROOT / path).is_file() else None


def copied(path: str) -> str:
    """Path in the site of a file that is not a page. It ends in .txt, except for pictures, so that a browser shows it."""
    return f"files/{path}" if path.endswith(PICTURES) else f"files/{path}.txt"
