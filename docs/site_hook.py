"""Builds the site from docs/ and from the files elsewhere in the repository that its pages link to.

Links in Markdown files are relative to the repository, so that they work where the repository is browsed. In the site,
the files in PAGES are pages of their own, and any other file outside docs/ is copied to repository/.
"""

from __future__ import annotations

import posixpath
import re
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "NOTICE": "credits.md",
    "SECURITY.md": "security.md",
    "examples/motion/README.md": "examples/motion.md",
}
_LINK = re.compile(r"(?<=\]\()[^)#\s]+")


def on_config(config: MkDocsConfig) -> None:
    """The address of the repository is that in the package's metadata, if the publisher has set one there."""
    urls = dict(line.split(", ", 1) for line in metadata("amflow-kernels").get_all("Project-URL") or ())
    config.repo_url = urls.get("Source", "")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for file in list(files.documentation_pages()):
        if file.src_uri.endswith(".md"):
            source = _source(file.src_uri)
            for path in filter(None, (_linked(source, link) for link in _LINK.findall(file.content_string))):
                if not path.startswith("docs/") and files.get_file_from_path(_in_site(path)) is None:
                    files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    folder, source = posixpath.dirname(page.file.src_uri), _source(page.file.src_uri)

    def replace(link: re.Match[str]) -> str:
        path = _linked(source, link[0])
        return posixpath.relpath(_in_site(path), folder or ".") if path else link[0]

    return _LINK.sub(replace, markdown)


def _source(page: str) -> str:
    """The path of a page's source in the repository."""
    return next((source for source, name in PAGES.items() if name == page), f"docs/{page}")


def _linked(source: str, link: str) -> str | None:
    """The path in the repository that a link in `source` leads to, or None if it leads to none of its files."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _in_site(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path, f"repository/{path}")
