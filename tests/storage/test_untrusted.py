"""Files of others: only regular ones are opened, only what fits its schema gets through."""

import os
import socket

import pytest

from yuzogpt.storage.untrusted import DamagedFile, Untrusted, parse_json, read_file, read_json


class Example(Untrusted):
    step: int
    metrics: dict[str, float]


def test_what_fits_is_read_and_what_is_not_named_is_left_out(tmp_path):
    path = tmp_path / "state.json"
    path.write_text('{"step": 3, "metrics": {"loss": NaN, "lr": 1}, "more": []}')
    found = read_json(path, Example)
    assert found.step == 3
    assert found.metrics["lr"] == 1.0
    assert not hasattr(found, "more")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"step": "3"}',
        b'{"step": true}',
        b'{"step": 3.5}',
        b'{"step": 1' + b"0" * 5000 + b"}",
        b'{"step": 1, "metrics": ' + b"[" * 100_000,
        b'{"step": 1, "more": ' + b"[" * 500 + b"]" * 500 + b"}",
        '{"step": 1}'.encode("utf-16"),
        '{"step": 1}'.encode("utf-32-be"),
        b'{"step": 1, "metrics": {"a": null}}',
        b"\xff",
    ],
)
def test_anything_else_is_one_line_that_names_the_file(content, tmp_path):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile) as error:
        read_json(path, Example)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


def test_a_byte_order_mark_is_no_part_of_json():
    assert parse_json(b'\xef\xbb\xbf{"step": 1, "metrics": {}}', Example, "x").step == 1


def test_only_regular_files_are_opened(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    link = tmp_path / "link"
    link.symlink_to("/dev/zero")
    for path in (fifo, link, tmp_path):
        with pytest.raises(DamagedFile, match="not a regular file"):
            read_file(path)
    with pytest.raises(DamagedFile):
        read_json(tmp_path / "socket", Example)
    listener.close()


def test_a_link_is_followed_only_where_that_is_wanted(tmp_path):
    (tmp_path / "file").write_bytes(b"{}")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    assert read_file(link) == b"{}"
    with pytest.raises(OSError, match="symbolic links"):
        read_file(link, follow_links=False)
    with pytest.raises(DamagedFile):
        read_json(link, dict, follow_links=False)


def test_a_large_file_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DamagedFile, match="at most 1,000 are read"):
        read_file(path, 1000)
