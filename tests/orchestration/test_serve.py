"""The service on Ray Serve: replicas that share weights, die under load, and are replaced."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import psutil
import pytest

from tests.conftest import yuzogpt
from tests.orchestration.clusters import started
from tests.serving.services import Service, service, stream, write_checkpoint

pytestmark = pytest.mark.slow
SHAPE = {"n_layer": 8, "n_embd": 384, "n_head": 6, "block_size": 256}  # 57 MB of weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("serve") / "run"
    write_checkpoint(directory, 20, 2.0, **SHAPE)
    return directory


@pytest.fixture(scope="module")
def served(run) -> Service:
    flags = ["--num_replicas=2", "--max_batch=2", "--max_waiting=4", "--max_choices=4"]
    with service(run, *flags, "--max_new_tokens=100000", "--max_body_bytes=100000") as found:
        yield found


def replicas(served: Service) -> set[int]:
    """Return the processes of the replicas."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    found = set()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ServeReplica" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def test_openais_client(served):
    with openai.OpenAI(base_url=f"{served.url}v1", api_key="none", max_retries=0) as client:
        settings = {"model": "run", "prompt": "bead", "max_tokens": 20, "seed": 3}
        whole = client.completions.create(**settings)
        pieces = client.completions.create(**settings, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(**settings, temperature=-1)


def test_a_stream_comes_token_by_token(served):
    times = [time.monotonic() for _ in stream(served, max_tokens=60)]
    assert len(times) == 60
    assert times[-1] - times[0] > 10 * (times[1] - times[0]) > 0


def test_replicas_share_the_weights_and_are_counted_apart(served):
    assert len(replicas(served)) == 2
    for _ in range(8):  # so that both have computed with all of them
        assert served.post(max_tokens=4).status_code == 200
    size = 0
    for pid in replicas(served):
        for line in psutil.Process(pid).memory_maps(grouped=False):
            if line.path.endswith("model.safetensors"):
                size += line.rss
                assert line.private_dirty == 0
    weights = 12 * SHAPE["n_layer"] * SHAPE["n_embd"] ** 2 * 4
    assert size > 1.9 * weights  # both read the same pages of the file
    text = httpx.get(f"{served.url}metrics").text
    assert len(set(re.findall(r'^yuzogpt_slots\{replica="(\w+)"\}', text, re.MULTILINE))) == 2
    assert served.gauge("slots") == 4


def test_mistakes_and_too_much_leave_the_replicas_as_they_are(served):
    before = replicas(served)
    for content, status in (
        ('{"model": ', 400), ('{"model": "run", "max_tokens": 1e9}', 400),
        ('{"model": "run", "temperature": NaN}', 400), ('{"model": "run", "x": 1}', 400),
        ('{"model": "run", "prompt": "' + "a" * 100_000 + '"}', 413),
    ):  # fmt: skip
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{served.url}v1/completions", content=content, headers=headers)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    large = b"a" * 100_000_000
    # It may be refused before all of it is sent; but nobody waits.
    with contextlib.suppress(httpx.NetworkError, httpx.ProtocolError):
        assert httpx.post(f"{served.url}v1/completions", content=large).status_code == 413
    assert replicas(served) == before


def test_a_client_that_goes_makes_room(served):
    """Its 100,000 tokens would take minutes."""
    pieces = stream(served, max_tokens=100_000)
    assert next(pieces)
    assert served.gauge("running_requests") == 1
    pieces.close()
    served.wait_until(lambda: served.gauge("running_requests") == 0)


async def ask(client: httpx.AsyncClient, url: str, tokens: int) -> str:
    """Return how a request ended: by its status, or because its connection did."""
    body = {"model": "run", "prompt": "bead", "max_tokens": tokens, "stream": True}
    try:
        async with client.stream("POST", f"{url}v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines()]
            if answer.status_code != 200:  # in OpenAI's form, from any layer
                assert json.loads("".join(lines))["error"]["type"] == "server_error"
                assert answer.status_code != 503 or int(answer.headers["Retry-After"]) >= 1
                return str(answer.status_code)
            return "whole" if "data: [DONE]" in lines else "cut"
    except httpx.TimeoutException:
        return "hung"
    except httpx.TransportError:
        return "cut"


def test_what_no_replica_has_a_place_for_is_refused_at_the_door(served):
    """Each has two slots and four places more; the proxy refuses the rest."""

    async def load() -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(ask(client, served.url, 60) for _ in range(60)))

    before = served.gauge("requests_total")
    ends = asyncio.run(load())
    assert set(ends) == {"whole", "503"}
    assert 6 <= ends.count("whole") <= 30  # at least one of them was full
    # Few of those who were refused ever reached a replica.
    assert served.gauge("requests_total") - before <= 30


def test_a_replica_killed_under_load_hangs_nobody(served):
    victim = min(replicas(served))
    before = served.gauge("new_tokens_total")

    def both_are_at_work() -> bool:
        new = served.gauge("new_tokens_total") - before
        # One alone runs two. The eight may have been shared out unevenly, or some refused.
        return new >= 20 and served.gauge("running_requests") > 2

    async def load() -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:
            asking = [asyncio.create_task(ask(client, served.url, 1200)) for _ in range(8)]
            await asyncio.to_thread(served.wait_until, both_are_at_work)
            os.kill(victim, signal.SIGKILL)
            return await asyncio.gather(*asking)

    ends = asyncio.run(load())
    assert len(ends) == 8
    assert set(ends) <= {"whole", "cut", "500", "503"}
    assert {"whole", "cut"} <= set(ends)
    served.wait_until(lambda: len(replicas(served) - {victim}) == 2, 60)
    served.wait_until(lambda: served.gauge("slots") == 4, 60)
    assert served.post(max_tokens=3).status_code == 200


SOMEBODYS_SERVE = """
import sys
import ray
from ray import serve
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
"""

SOMEBODYS_SHUTDOWN = """
import sys
import ray
from ray import serve
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
serve.shutdown()
"""


def test_a_serve_that_runs_already_keeps_its_address(run):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with started(head_cpus=2, nodes=0) as cluster:
        code = [sys.executable, "-c", SOMEBODYS_SERVE, cluster.address, str(port)]
        subprocess.run(code, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, check=True)
        joining = f"--ray_address={cluster.address}"
        result = yuzogpt("serve", str(run), joining, "--port=1", RAY_AUTH_MODE="disabled")
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1
        assert f"runs on this cluster at 127.0.0.1:{port}" in result.stderr
        with service(run, joining, RAY_AUTH_MODE="disabled") as found:  # --port=0: any
            assert found.url == f"http://127.0.0.1:{port}/"
            assert found.post(max_tokens=3).status_code == 200
        # It was there before, and is there still.
        assert httpx.get(f"http://127.0.0.1:{port}/-/routes").json() == {}
        with service(run, joining, RAY_AUTH_MODE="disabled") as found:
            code = [sys.executable, "-c", SOMEBODYS_SHUTDOWN, cluster.address]
            subprocess.run(code, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, check=True)
            assert found.process.wait(30) == 1
    assert "".join(found.printed).endswith("yuzogpt: Serve was shut down on this cluster\n")
    assert "Traceback" not in "".join(found.printed)
