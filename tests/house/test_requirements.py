"""What is installed: all of it pinned, with hashes, and nothing that is needed left out."""

import importlib.metadata
import re
import tomllib

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "requirements"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
TORCH = ("torch", "torch-cpu")


def entries(name):
    """Yield each requirement of a file, and of those that it begins with, with its hashes."""
    text = (FOLDER / f"{name}.txt").read_text().replace("\\\n", "")
    for line in text.splitlines():
        if line.startswith("-r "):
            yield from entries(line.removeprefix("-r ").removesuffix(".txt"))
        elif not line.startswith("#"):
            requirement, *hashes = line.split("--hash=")
            yield Requirement(requirement), [value.strip() for value in hashes]


def pins(*names):
    """Return the version of each package in these files."""
    found = {}
    for requirement, _ in (entry for name in names for entry in entries(name)):
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert found.setdefault(requirement.name, specifier.version) == specifier.version
    return found


def needed(requirement, seen):
    """Yield the names of all that a requirement brings here, as far as that is installed."""
    name = canonicalize_name(requirement.name)
    key = (name, *sorted(requirement.extras))
    if key in seen:
        return
    seen.add(key)
    yield name
    environments = [{**default_environment(), "extra": one} for one in (*requirement.extras, "")]
    for text in importlib.metadata.requires(name) or ():
        wanted = Requirement(text)
        if not wanted.marker or any(map(wanted.marker.evaluate, environments)):
            yield from needed(wanted, seen)


def test_there_is_a_file_for_each_extra():
    others = {"build", "core", *TORCH}
    assert {path.stem for path in FOLDER.glob("*.txt")} == {*EXTRAS, *GROUPS, *others}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_every_package_is_pinned_and_has_hashes(path):
    for requirement, hashes in entries(path.stem):
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes)
        assert requirement.url is None
    assert "://" not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["core", "wandb", "harness", "cluster", "aws", "gcp", "dev"])
def test_nothing_that_is_needed_is_missing(extra):
    wanted = [*PROJECT["project"]["dependencies"], *EXTRAS.get(extra, ())]
    found = pins(extra, "torch")
    seen = set()
    for text in wanted:
        missing = set(needed(Requirement(text), seen)) - set(found) - {"yuzogpt"}
        assert missing == set(), text


def test_hashes_and_versions_are_of_the_same_packages():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in versions.items()}
    assert versions == pins(*(path.stem for path in FOLDER.glob("*.txt") if path.stem != TORCH[1]))
    assert pins("torch-cpu") == {"torch": pins("torch")["torch"] + "+cpu"}


@pytest.mark.parametrize("hole", ["starlette==0.49.0"])  # CVE-2025-62727
def test_no_version_with_a_known_hole_is_accepted(hole):
    name, version = hole.split("==")
    (wanted,) = [
        requirement
        for requirement in map(Requirement, PROJECT["project"]["dependencies"])
        if canonicalize_name(requirement.name) == name
    ]
    assert version not in wanted.specifier
    assert pins("core")[name] in wanted.specifier


def test_what_builds_the_project_is_pinned():
    for text in PROJECT["build-system"]["requires"]:
        wanted = Requirement(text)
        assert pins("build")[wanted.name] in wanted.specifier
