"""The pages that users read, and what the tests need of Markdown."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
GENERATED = REPOSITORY / "docs" / "settings.md"
GUIDES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
OTHERS = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"]
PAGES = [*GUIDES, *(REPOSITORY / name for name in [*OTHERS, "cluster/README.md"])]

FENCE = re.compile(
    r"(?:<!-- (?P<marker>[^\n]*?) -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
HEADING = re.compile(r"^#+ (.+)$", re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, kind: str) -> Iterator[tuple[str, str]]:
    """Yield the marker (a comment just before) and the text of each fenced block of a kind."""
    for fence in FENCE.finditer(page.read_text()):
        if fence["kind"] == kind:
            yield fence["marker"] or "", fence["text"]


def without_blocks(page: Path) -> str:
    """Return a page's text without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(without_blocks(page)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = 0
        while (f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


def links(page: Path) -> set[str]:
    """Return the targets of a page's links to files and headings of the repository."""
    targets = LINK.findall(re.sub(r"`[^`\n]*`", "", without_blocks(page)))
    return {target for target in targets if not re.match(r"\w+:", target)}
