"""`yuzogpt prepare openwebtext`, as README has it, against a hub of the test's own."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.conftest import yuzogpt
from tests.data.text_sources import make_documents, write_parquet
from yuzogpt.data.blocks import open_corpus
from yuzogpt.data.preparation.corpora import OPENWEBTEXT

REPOSITORY, _, REVISION = OPENWEBTEXT.removeprefix("hf://datasets/").partition("@")
REVISION = REVISION.partition("/")[0]


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does for one revision of one dataset."""

    folder: Path  # what lies in plain_text/

    def do_GET(self) -> None:
        """Repository, listing, or bytes of a file."""
        path = unquote(urlparse(self.path).path)
        api = f"/api/datasets/{REPOSITORY}"
        if path == f"{api}/revision/{REVISION}":
            self.send(json.dumps({"id": REPOSITORY, "sha": REVISION}).encode())
        elif path.startswith(f"{api}/tree/{REVISION}"):
            below = path.removeprefix(f"{api}/tree/{REVISION}").strip("/")
            folder = {"type": "directory", "oid": "0", "size": 0, "path": "plain_text"}
            self.send(json.dumps(self.files() if below else [folder, *self.files()]).encode())
        elif path.startswith(f"/datasets/{REPOSITORY}/resolve/{REVISION}/plain_text/"):
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
            start, _, stop = self.headers.get("Range", "bytes=0-").partition("=")[2].partition("-")
            last = min(int(stop or len(content)), len(content) - 1)
            piece = content[int(start) : last + 1]
            self.send(piece, 206, f"bytes {start}-{last}/{len(content)}")
        else:
            self.send(b"{}", 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """What is known of some paths."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        folder = {"type": "directory", "oid": "0", "size": 0, "path": "plain_text"}
        self.send(json.dumps([f for f in [folder, *self.files()] if f["path"] in asked]).encode())

    def files(self) -> list[dict[str, object]]:
        """List the files as the hub does."""
        return [
            {
                "type": "file",
                "oid": path.name,
                "size": path.stat().st_size,
                "path": f"plain_text/{path.name}",
            }
            for path in sorted(self.folder.iterdir())
        ]

    def send(self, content: bytes, status: int = 200, content_range: str = "") -> None:
        """Answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"etag"')
        self.send_header("X-Repo-Commit", REVISION)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(tmp_path):
    """A hub that serves four files of parquet; yields its address."""
    Hub.folder = write_parquet(tmp_path / "web", make_documents(400))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_openwebtext_from_the_hub(hub, tmp_path):
    arguments = ["prepare", "openwebtext", "--num_workers=0"]
    environment = {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    result = yuzogpt(*arguments, f"--data_dir={tmp_path}/1", **environment)
    assert result.returncode == 0, result.stderr
    assert "4 files, 400 documents" in result.stdout
    assert "warning: openwebtext has 8,013,769 documents, this source 400" in result.stdout
    local = yuzogpt(*arguments, f"--source={tmp_path}/web", f"--data_dir={tmp_path}/2")
    assert local.returncode == 0, local.stderr
    first, second = open_corpus(tmp_path / "1"), open_corpus(tmp_path / "2")
    assert first.fingerprint == second.fingerprint
    assert first.manifest.split_rule == "nanogpt 0.0005"
    again = yuzogpt(*arguments, f"--data_dir={tmp_path}/1", HF_ENDPOINT="http://127.0.0.1:9")
    assert "already prepared" in again.stdout  # needs no hub


@pytest.mark.slow
def test_without_web_one_line_says_what_would_work(tmp_path):
    result = yuzogpt(
        "prepare",
        "openwebtext",
        f"--data_dir={tmp_path}/1",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hf"),
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "--source=" in result.stderr
    assert not (tmp_path / "1").exists()
