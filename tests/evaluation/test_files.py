"""Downloaded benchmark files: only the published file gets into the cache."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.evaluation.conftest import change_published
from yuzogpt.data.preparation.corpora import TINYSHAKESPEARE_URL
from yuzogpt.errors import UserError
from yuzogpt.evaluation.benchmarks.files import fetch, find, is_published
from yuzogpt.evaluation.benchmarks.tasks import TASKS, Published

CONTENT = b"a line of a benchmark\n" * 100
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PUBLISHED = {name: task.published for name, task in TASKS.items()}
PAGE = b"\n<!DOCTYPE html><title>Sign in</title>"


class Answers(BaseHTTPRequestHandler):
    """A web server with the right file, a short answer and a web page."""

    def do_GET(self) -> None:
        body = {"/file": CONTENT, "/short": CONTENT, "/page": PAGE}.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write((body or b"")[: 50 if self.path == "/short" else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_kept(web, tmp_path):
    path = tmp_path / "cache" / "file.txt"
    fetch("ptb", Published(f"{web}/file", DIGEST), path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "digest", "message"),
    [("short", "", "out of reach"), ("page", "", "answers with a web page"),
     ("missing", "", "out of reach"), ("file", "0" * 64, "the published file's is 000000000000")],
)  # fmt: skip
def test_what_is_not_the_file_is_not_kept(web, tmp_path, name, digest, message):
    with pytest.raises(UserError, match=message):
        fetch("ptb", Published(f"{web}/{name}", digest), tmp_path / "cache" / "file.txt")
    assert not list(tmp_path.rglob("*.*"))


def test_nobody_answers(web, tmp_path):
    with pytest.raises(UserError, match=r"out of reach \(.*refused\); put that file in a folder"):
        fetch("ptb", Published("http://127.0.0.1:9/file"), tmp_path / "file.txt")


@pytest.mark.parametrize("url", [TINYSHAKESPEARE_URL, *(one.url for one in PUBLISHED.values())])
def test_no_url_is_of_a_branch(url):
    if url.startswith("https://raw.githubusercontent.com/"):
        assert re.fullmatch("[0-9a-f]{40}", url.split("/")[5])


def test_what_is_fetched_has_a_hash(monkeypatch, tmp_path):
    assert all(len(one.sha256) == 64 for one in PUBLISHED.values() if not one.how)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="is missing; put this file there"):
        find("ptb", "")


def test_a_copy_that_is_packed_in_another_way_is_known_by_its_size(monkeypatch):
    change_published(monkeypatch, ["enwik8"], sha256=PUBLISHED["enwik8"].sha256)
    change_published(monkeypatch, ["lambada"], sha256=PUBLISHED["lambada"].sha256)
    assert is_published("enwik8", PUBLISHED["enwik8"].sha256, 1)
    assert is_published("enwik8", "0" * 64, 100_000_000)
    assert is_published("enwik8", "0" * 64, 99) is False
    assert is_published("lambada", "0" * 64, 5_153) is False
    assert is_published("wikitext103", "0" * 64, 1) is None
