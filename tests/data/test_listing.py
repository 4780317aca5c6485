"""Which files a source has: links, hidden files, and a corpus that lies in its own source."""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import make_text
from tests.data.test_prepare import run
from tests.data.text_sources import make_documents, write_jsonl
from yuzogpt.data.blocks import MANIFEST, SOURCE_TIMES, open_corpus
from yuzogpt.data.preparation.prepare import LocalWorkers
from yuzogpt.errors import UserError
from yuzogpt.storage.filesystems import list_files
from yuzogpt.storage.paths import is_within


def listed(source: Path | str, folder: Path) -> list[str]:
    """List a source; the names of its files, as they lie in `folder`."""
    return [str(Path(info.path).relative_to(folder)) for info in list_files(str(source))[1]]


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")


def test_symlinks_compare_as_what_they_lead_to(tmp_path, monkeypatch):
    make_files(tmp_path, "a/b/file")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    for path in ("a", "a/b/file", "link", "link/b", "a/../link/b/none", "a/b/.."):
        assert is_within(tmp_path / path, tmp_path / "a")
        assert is_within(tmp_path / path, tmp_path / "link")
    assert is_within(Path("b"), tmp_path / "link")
    for path in ("", "ab", "a/../b", "link/.."):
        assert not is_within(tmp_path / path, tmp_path / "link")


def test_links_add_each_real_file_once_and_loops_end(tmp_path):
    web, other = tmp_path / "web", tmp_path / "other"
    make_files(web, "a.txt", "sub/b.txt", "sub/c.txt")
    make_files(other, "d.txt")
    (web / "sub" / "up").symlink_to("..")
    (web / "sub" / "self").symlink_to("self")
    (web / "more").symlink_to(other)
    (web / "more2").symlink_to(other)
    (web / "0.txt").symlink_to("a.txt")
    (web / "broken.txt").symlink_to("nothing")
    (other / "back").symlink_to(web)
    expected = ["a.txt", "more/d.txt", "sub/b.txt", "sub/c.txt"]
    assert listed(web, web) == expected
    assert listed(f"{web}/**/*.txt", web) == expected
    assert listed(f"{web}/*.txt", web) == ["a.txt"]
    assert listed(f"{web}/*/*.txt", web) == expected[1:]
    corpus, _ = run(web, tmp_path / "1")
    assert corpus.manifest.source["documents"] == 4


def test_a_linked_folder_is_listed_as_the_folder(tmp_path):
    make_files(tmp_path / "web", "a.txt", "sub/b.txt")
    (tmp_path / "link").symlink_to("web")
    assert listed(tmp_path / "link", tmp_path / "link") == ["a.txt", "sub/b.txt"]
    assert listed(f"{tmp_path}/link/**/*.txt", tmp_path / "link") == ["a.txt", "sub/b.txt"]


def test_what_is_named_counts_and_hidden_files_of_folders_do_not(tmp_path):
    make_files(tmp_path, "_raw.txt", ".raw.txt", "raw.txt", "_tmp/a.txt", ".git/b.txt")
    assert listed(tmp_path, tmp_path) == ["raw.txt"]
    assert listed(tmp_path / "_raw.txt", tmp_path) == ["_raw.txt"]
    assert listed(tmp_path / "_tmp", tmp_path) == ["_tmp/a.txt"]
    assert listed(f"{tmp_path}/*raw.txt", tmp_path) == [".raw.txt", "_raw.txt", "raw.txt"]
    assert listed(f"{tmp_path}/_*/*.txt", tmp_path) == ["_tmp/a.txt"]
    with pytest.raises(UserError, match="no file there"):
        listed(f"{tmp_path}/**/a.txt", tmp_path)
    path = write_jsonl(tmp_path / "_raw.jsonl", ["one", "two"])
    for source in (path, f"{tmp_path}/_*.jsonl"):
        assert run(source, tmp_path / "1")[0].manifest.source["documents"] == 2


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "data_dir"),
    [
        ("web", "web/corpus"),
        ("web", "link/corpus"),
        ("link", "web/corpus"),
        ("web/../web", "web/corpus"),
        ("web", "other/../web/corpus"),
        ("other", "web/corpus"),  # other/web leads there
        ("web/corpus", "web"),
        ("link/a.txt", "web"),  # one text file
        ("web", "link"),
        ("web/**/*.json*", "link/corpus"),
    ],
)
def test_overwrite_is_refused_where_source_and_corpus_lie_in_each_other(tmp_path, source, data_dir):
    write_jsonl(tmp_path / "web" / "a.jsonl", make_documents(30))
    write_jsonl(tmp_path / "other" / "a.jsonl", ["one"])
    if source == "link/a.txt":
        make_files(tmp_path, "web/a.txt")
    (tmp_path / "link").symlink_to("web")
    (tmp_path / "other" / "web").symlink_to(tmp_path / "web")
    run(tmp_path / "web" / "a.jsonl", tmp_path / "new")
    for name in {"web/corpus", data_dir}:
        shutil.copytree(tmp_path / "new", tmp_path / name, dirs_exist_ok=True)
    before = snapshot(tmp_path / data_dir)
    assert MANIFEST in before
    with pytest.raises(UserError, match="lie in each other; choose another --data_dir"):
        run(f"{tmp_path}/{source}", Path(f"{tmp_path}/{data_dir}"), "--overwrite")
    assert snapshot(tmp_path / data_dir) == before


def test_a_corpus_that_a_link_in_its_source_leads_to_is_not_its_source(tmp_path):
    write_jsonl(tmp_path / "web" / "a.jsonl", make_documents(30))
    (tmp_path / "web" / "corpus").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus").mkdir()
    corpus, _ = run(tmp_path / "web", tmp_path / "corpus")
    assert run(tmp_path / "web", tmp_path / "web" / "corpus")[1] is False
    assert corpus.manifest.source["documents"] == 30


class NotStarting(LocalWorkers):
    """A cluster that is full, say."""

    def start(self) -> None:
        raise UserError("no room")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["none", "bad.jsonl", "new.jsonl"])
def test_overwrite_deletes_nothing_before_the_work_can_start(tmp_path, monkeypatch, source):
    run(write_jsonl(tmp_path / "a.jsonl", make_documents(30)), tmp_path / "1")
    before = snapshot(tmp_path / "1")
    write_jsonl(tmp_path / "new.jsonl", make_documents(20))
    (tmp_path / "bad.jsonl").write_text("nonsense")
    monkeypatch.setattr("tests.data.test_prepare.LocalWorkers", NotStarting)
    with pytest.raises(UserError):
        run(tmp_path / source, tmp_path / "1", "--overwrite")
    assert snapshot(tmp_path / "1") == before
    open_corpus(tmp_path / "1").verify(reread=True)


def test_a_text_that_cannot_be_written_costs_no_old_corpus(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(make_text(5_000))
    (tmp_path / "b.txt").write_text(make_text(50_000))
    run(tmp_path / "a.txt", tmp_path / "1")
    before = snapshot(tmp_path / "1")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="are free; choose another --data_dir"):
        run(tmp_path / "b.txt", tmp_path / "1", "--overwrite")
    assert snapshot(tmp_path / "1") == before


def test_other_kinds_of_files_are_no_text(tmp_path):
    make_files(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    assert listed(tmp_path, tmp_path) == ["a.txt"]


@pytest.mark.slow
def test_a_source_that_changed_at_equal_size_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "web" / "a.jsonl", ["one"] * 9)
    first, _ = run(tmp_path / "web", tmp_path / "1")
    assert run(tmp_path / "web", tmp_path / "1")[1] is False
    shutil.copytree(tmp_path / "web", tmp_path / "copy", copy_function=shutil.copyfile)
    assert run(tmp_path / "copy", tmp_path / "1")[1] is False  # the same files, elsewhere
    write_jsonl(path, ["two"] * 9)
    os.utime(path, ns=(1, 1))
    (tmp_path / "link").symlink_to("web")
    with pytest.raises(UserError, match=r"a.jsonl: changed since .*; --overwrite"):
        run(tmp_path / "link", tmp_path / "1")
    second, is_new = run(tmp_path / "web", tmp_path / "1", "--overwrite")
    assert is_new
    assert first.fingerprint != second.fingerprint
    write_jsonl(path, ["one"] * 9)
    again, _ = run(tmp_path / "web", tmp_path / "1", "--overwrite")
    assert again.fingerprint == first.fingerprint  # times are no part of the corpus
    (tmp_path / "1" / SOURCE_TIMES).write_text("[" * 100_000)
    assert run(tmp_path / "web", tmp_path / "1")[1] is False  # a memory, no more
