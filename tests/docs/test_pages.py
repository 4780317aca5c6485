"""README and docs: links lead somewhere, the settings' page is fresh, the language is plain."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import REPOSITORY
from tests.docs.pages import GENERATED, GUIDES, PAGES, README, anchors, links, name_of
from yuzogpt.cli import VERBS
from yuzogpt.cli.help import verb_help
from yuzogpt.orchestration.ray_internals import FEATURES

# Words that a reader of English stumbles over here.
ODD = re.compile(r"\b(anew|goes on|whoever|in vain|foretells?|likeliest)\b", re.IGNORECASE)
PATH = re.compile(r"`([a-z][\w-]*/[\w./-]*\w\.(?:py|sh|yaml|txt|toml|md))`")
# What writes a record: MetricsLog.write, StepLog.write, append_record.
RECORD = re.compile(r"""(?:\b(?:log|records|self)\.write\(|append_record\([^"()]*)\s*"(\w+)",""")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    broken = []
    for link in sorted(links(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_index_and_on_the_site():
    index = links(REPOSITORY / "docs" / "index.md")
    names = {page.name for page in GUIDES if page != README} - {"index.md"}
    assert names - index == set()
    navigation = (REPOSITORY / "mkdocs.yml").read_text()
    assert {name for name in names if f": {name}\n" not in navigation} == set()


def test_the_page_of_settings_is_fresh():
    page = subprocess.run(
        [sys.executable, REPOSITORY / "docs" / "generate.py"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert page == GENERATED.read_text(), "python docs/generate.py > docs/settings.md"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page):
    """Paths in code font: from the project's root, or below the package's."""
    missing = [
        path
        for path in set(PATH.findall(page.read_text()))
        if not any((root / path).exists() for root in (REPOSITORY, REPOSITORY / "yuzogpt"))
    ]
    assert missing == []


def test_the_architecture_has_every_room():
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    rooms = [path.parent.name for path in (REPOSITORY / "yuzogpt").glob("*/__init__.py")]
    assert [room for room in rooms if f"| `{room}/` |" not in text] == []


def test_the_decisions_have_every_private_feature_of_ray():
    text = (REPOSITORY / "docs" / "decisions.md").read_text()
    assert [name for name in FEATURES if f"| `{name}` |" not in text] == []


def test_the_formats_have_every_kind_of_record():
    text = (REPOSITORY / "docs" / "formats.md").read_text()
    sources = [path.read_text() for path in (REPOSITORY / "yuzogpt").rglob("*.py")]
    kinds = {kind for source in sources for kind in RECORD.findall(source)}
    assert {"train", "checkpoint", "failure", "tasks"} <= kinds
    assert {kind for kind in kinds if f"`{kind}`" not in text} == set()


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_pages_are_in_plain_english(page):
    assert ODD.findall(page.read_text()) == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_in_plain_english(verb):
    assert ODD.findall(verb_help(verb)) == []


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_the_citation_has_the_version():
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"## [{version}]" in (REPOSITORY / "CHANGELOG.md").read_text()
