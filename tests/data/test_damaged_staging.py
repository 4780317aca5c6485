"""A staging directory that is damaged, or somebody else's: done again, or one line."""

import json
import os

import pytest

from tests.data.test_prepare import interrupt, run
from tests.data.text_sources import make_documents, write_jsonl, write_parquet
from yuzogpt.data.blocks import MANIFEST, STAGING, open_corpus
from yuzogpt.data.inspect import show
from yuzogpt.data.preparation import sources
from yuzogpt.data.preparation.records import read_counts, read_record
from yuzogpt.data.preparation.sources import list_source
from yuzogpt.errors import UserError

DEEP = "[" * 100_000
RULE = ("--split_rule=nanogpt", "--val_fraction=0.1")
PRECIOUS = b"of the user"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("source") / "web", make_documents(20))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source):
    """The fingerprint of the corpus that nothing befell."""
    return run(source, tmp_path_factory.mktemp("whole") / "1", *RULE)[0].fingerprint


@pytest.mark.slow
def test_a_damaged_plan_is_one_line(tmp_path, source, whole):
    interrupt(source, tmp_path / "1", *RULE)
    plan = tmp_path / "1" / STAGING / "plan.json"
    for content in (DEEP, "", "[]", "\ud800", None):
        plan.unlink()
        if content is None:
            os.mkfifo(plan)
        else:
            plan.write_text(content, errors="surrogatepass")
        with pytest.raises(UserError, match=r"plan\.json: .*; start again with --overwrite"):
            run(source, tmp_path / "1", *RULE)
    assert run(source, tmp_path / "1", *RULE, "--overwrite")[0].fingerprint == whole


def test_a_damaged_record_is_done_again(tmp_path, source, whole, capsys):
    (tmp_path / "precious").write_bytes(PRECIOUS)
    interrupt(source, tmp_path / "1", *RULE)
    unit = list_source(str(source), "text", False, tmp_path / "1").units[0]
    path = tmp_path / "1" / STAGING / "unit-000000.json"
    record = json.loads(path.read_text())
    assert read_record(path.parent, unit)
    train = record["train"][0]
    for change in (
        {"unit": 1},
        {"documents": "many"},
        {"documents": 10**400},
        {"documents": record["documents"] + 1},
        {"sha256": "no digest"},
        {"rejected": {"empty": -1}},
        {"val_rows": [*record["val_rows"], 10**6]},
        {"val": [train]},
        {"train": [train, train]},
        {"train": [{**train, "tokens": "x"}]},
        {"train": [{**train, "tokens": -1}]},
        {"train": [{**train, "sha256": "0"}]},
        {"train": [{**train, "bytes": train["bytes"] + 1}]},
        {"train": [{**train, "file": "../../precious", "bytes": len(PRECIOUS)}]},
    ):
        path.write_text(json.dumps(record | change))
        assert read_record(path.parent, unit) is None, change
    for content in (DEEP, "", "[]", "null"):
        path.write_text(content)
        assert read_record(path.parent, unit) is None, content
    path.write_text(json.dumps(record | change))
    assert run(source, tmp_path / "1", *RULE)[0].fingerprint == whole
    assert "resuming: 1 of 4 units are done" in capsys.readouterr().out
    assert (tmp_path / "precious").read_bytes() == PRECIOUS


def test_a_staged_link_is_done_again(tmp_path, source, whole):
    interrupt(source, tmp_path / "1", *RULE)
    staged = next((tmp_path / "1" / STAGING).glob("unit-000000-train-*.arrow"))
    staged.rename(tmp_path / "elsewhere")
    staged.symlink_to(tmp_path / "elsewhere")
    assert run(source, tmp_path / "1", *RULE)[0].fingerprint == whole
    assert not any(path.is_symlink() for path in (tmp_path / "1").iterdir())


def test_a_staging_directory_that_is_a_link_is_refused(tmp_path, source):
    interrupt(source, tmp_path / "other", *RULE)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / STAGING).symlink_to(tmp_path / "other" / STAGING)
    for flags in (RULE, (*RULE, "--overwrite")):
        with pytest.raises(UserError, match=r"\.preparing: a symlink"):
            run(source, tmp_path / "1", *flags)
    assert (tmp_path / "other" / STAGING / "plan.json").is_file()


def test_damaged_counts_are_counted_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 5_000)
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(20))
    whole, _ = run(source, tmp_path / "whole", *RULE)
    interrupt(source, tmp_path / "1", *RULE)
    units = list_source(str(source), "text", False, tmp_path / "1").units
    path = tmp_path / "1" / STAGING / "counts.json"
    assert len(read_counts(path.parent, units)) == len(units) > 1
    for content in (DEEP, "[1]", json.dumps([-1] * len(units)), '["a", "b"]', "{}", ""):
        path.write_text(content)
        assert read_counts(path.parent, units) is None
    assert run(source, tmp_path / "1", *RULE)[0].fingerprint == whole.fingerprint


def test_a_manifest_with_a_damaged_source_is_one_line(tmp_path, source):
    run(source, tmp_path / "1", *RULE)
    path = tmp_path / "1" / MANIFEST
    manifest = json.loads(path.read_text())
    for change in (
        {"name": None},
        {"sha256": 3},
        {"bytes": "many"},
        {"files": [1]},
        {"files": [{"name": "a"}]},
        {"settings": []},
    ):
        path.write_text(json.dumps(manifest | {"source": manifest["source"] | change}))
        with pytest.raises(UserError, match=r"manifest\.json: source: "):
            run(source, tmp_path / "1", *RULE)
        with pytest.raises(UserError, match=r"manifest\.json: source: "):
            show(open_corpus(tmp_path / "1"), 3)
