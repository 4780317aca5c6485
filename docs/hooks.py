"""MkDocs hooks: pages that live outside docs/, and links as they are in the repository.

In the repository a page links to files by their paths, so that links work there, too. On the site,
a link to another page becomes that page's; a link to a source file becomes plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "cluster/README.md": "cluster-setup.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
PATHS = {page: path for path, page in PAGES.items()}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    root = Path(config.config_file_path).parent
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(root / path).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn a page's links from paths in the repository into pages of the site."""
    path = PATHS.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    root = Path(config.config_file_path).parent

    def replace(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        name = PAGES.get(target, target.removeprefix("docs/"))
        is_source = files.get_file_from_path(name) is None and (root / target).exists()
        return str(text) if is_source else f"[{text}]({name}{anchor or ''})"

    return LINK.sub(replace, markdown)
