"""What a user asks `prepare` and `inspect` for is done, or refused in a line: never ignored."""

import pytest

from tests.conftest import make_text, yuzogpt
from tests.data.test_prepare import run
from tests.data.text_sources import make_documents, write_jsonl, write_parquet
from yuzogpt.config import PrepareSettings
from yuzogpt.config.resolve import resolve
from yuzogpt.data.preparation.prepare import LocalWorkers, prepare
from yuzogpt.errors import UserError

SETTINGS_OF_DOCUMENTS = [
    "--val_fraction=0.1",
    "--max_document_bytes=100",
    "--text_column=body",
    "--block_tokens=1000",
    "--ray_address=127.0.0.1:9",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(make_text(5_000))
    return path


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
@pytest.mark.parametrize("flag", SETTINGS_OF_DOCUMENTS)
def test_settings_of_documents_are_refused_for_one_text(tmp_path, text, tokenizer, flag):
    with pytest.raises(UserError, match=rf"{flag.partition('=')[0]}.*: not for mine, .* one text"):
        run(text, tmp_path / "1", f"--tokenizer={tokenizer}", flag)
    assert not (tmp_path / "1").exists()
    run(text, tmp_path / "1", f"--tokenizer={tokenizer}")
    with pytest.raises(UserError, match="one text"):  # a finished corpus changes nothing
        run(text, tmp_path / "1", f"--tokenizer={tokenizer}", flag)


@pytest.mark.parametrize("flag", ["--split_rule=hash", "--split_rule=nanogpt", "--by_line=True"])
@pytest.mark.parametrize("corpus", ["mine", "shakespeare"])
def test_documents_are_refused_where_the_whole_text_is_needed(tmp_path, text, corpus, flag):
    flags = [f"--dataset={corpus}", "--tokenizer=" + ("char" if corpus == "mine" else "gpt2")]
    with pytest.raises(UserError, match=rf"{flag.partition('=')[0]}.*: not for {corpus}"):
        run(text, tmp_path / "1", *flags, flag)


def test_what_one_text_does_is_heeded(tmp_path, text):
    flags = ("--split_rule=tail", "--by_line=False", "--max_document_bytes=0", "--num_workers=0")
    corpus, _ = run(text, tmp_path / "1", "--tokenizer=char", *flags)
    assert corpus.manifest.split_rule == "tail"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json", "a.txt.zst", "a.jsonl.gz"])
@pytest.mark.parametrize("flags", [["--tokenizer=char"], ["--dataset=shakespeare"]])
def test_one_text_is_no_other_format(tmp_path, name, flags):
    if name == "a.parquet":
        write_parquet(tmp_path, make_documents(9), files=1)
        (tmp_path / "part-000.parquet").rename(tmp_path / name)
    else:
        write_jsonl(tmp_path / name, make_documents(9))
    with pytest.raises(UserError, match=f"{name}: .* needs one plain text file"):
        run(tmp_path / name, tmp_path / "1", *flags)
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("source", ["s3://bucket/a.txt", "{tmp}/*.txt"])
def test_one_text_is_one_file_of_this_machine(tmp_path, text, source):
    with pytest.raises(UserError, match=r"needs one plain text file"):
        run(source.replace("{tmp}", str(tmp_path)), tmp_path / "1", "--tokenizer=char")


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("a.jsonl", "--by_line=True", "--by_line: .* jsonl"),
        ("a.txt", "--text_column=text", "--text_column=text: .* plain text"),
    ],
)
def test_settings_of_another_format_are_refused(tmp_path, name, flag, message):
    write_jsonl(tmp_path / "web" / name, make_documents(9))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "web", tmp_path / "1", flag)
    assert not (tmp_path / "1").exists()


def test_this_process_is_no_cluster():
    with pytest.raises(UserError, match=r"--num_workers=0 .* --ray_address"):
        resolve(PrepareSettings, [], ["--num_workers=0", "--ray_address=auto"])


@pytest.mark.slow
def test_inspect_does_all_that_it_is_asked_for(tmp_path, text):
    run(text, tmp_path / "1", "--tokenizer=char")
    flags = ("inspect", str(tmp_path / "1"), "--verify")
    assert "--- document" not in yuzogpt(*flags).stdout
    result = yuzogpt(*flags, "--examples=1")
    assert "verified: 2 blocks" in result.stdout
    assert result.stdout.count("--- document") == 1


def test_another_kind_of_corpus_is_said_to_be_one(tmp_path, text):
    run(text, tmp_path / "1")
    with pytest.raises(UserError, match="another source: one text file, not 1 lines files"):
        run(text, tmp_path / "1", "--by_line=True")
    run(text, tmp_path / "2", "--by_line=True")
    with pytest.raises(UserError, match="another source: 1 lines files, not one text file"):
        run(text, tmp_path / "2")


def test_hashes_in_messages_are_short(tmp_path, text):
    run(text, tmp_path / "1")
    text.write_text(make_text(6_000))
    with pytest.raises(UserError, match=r"another source: .*SHA-256 \w{12}, not \w{12};"):
        run(text, tmp_path / "1")


def test_one_document_is_said_to_be_why_the_val_split_is_empty(tmp_path, text, capsys):
    flags = ["--source=" + str(text), "--dataset=mine", "--tokenizer=gpt2", "--split_rule=hash"]
    prepare(resolve(PrepareSettings, [], flags), tmp_path / "1", LocalWorkers())
    assert "the val split is empty: no two documents differ" in capsys.readouterr().out
