"""A run that is followed: better weights are served without a gap, broken ones never."""

import json
import threading

import httpx
import pytest

from tests.serving.services import SLOW, Service, service, stream, write_checkpoint
from yuzogpt.storage.atomic_files import sha256

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    write_checkpoint(directory, 20, 2.0, **SLOW)
    rows = [{"kind": "train", "step": n, "loss": 4 - n / 10, "time": 1.0 + n} for n in range(1, 21)]
    rows.append({"kind": "evaluation", "step": 20, "val_loss_estimate": 2.0, "time": 30.0})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def served(run) -> Service:
    flags = ["--num_replicas=0", "--follow", "--follow_interval=0.1", "--max_new_tokens=100000"]
    with service(run, *flags, "--threads=1") as running:
        yield running


def test_better_weights_are_served_without_a_gap(run, served):
    assert served.model()["follows_its_run"] is True
    curve = httpx.get(f"{served.url}v1/run").json()
    assert curve == {
        "train": [[n, pytest.approx(4 - n / 10)] for n in range(1, 21)],
        "val": [[20, 2.0]],
        "step": 20,
    }
    body = {"max_tokens": 400, "seed": 3, "temperature": 1.0}
    undisturbed = served.post(**body).json()["choices"][0]["text"]

    statuses, stop = [], threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            statuses.append(served.post(max_tokens=2).status_code)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    pieces = stream(served, **body)
    chunks = [next(pieces)]
    write_checkpoint(run, 40, 1.9, seed=2, **SLOW)
    served.wait_until(lambda: served.model()["step"] == 40)
    # A running request finishes with the weights that it started with.
    chunks += pieces
    assert "".join(piece["choices"][0]["text"] for piece in chunks) == undisturbed
    assert {piece["system_fingerprint"] for piece in chunks} == {"step-20-float32"}
    answer = served.post(**body).json()
    assert answer["system_fingerprint"] == "step-40-float32"
    assert answer["choices"][0]["text"] != undisturbed
    stop.set()
    asking.join()
    assert set(statuses) == {200}
    assert served.gauge("weights_step") == 40


def test_a_corrupt_checkpoint_is_refused_and_the_next_one_taken(run, served):
    # Made elsewhere and renamed, as a run does; then the disk returns other bytes.
    broken = write_checkpoint(run.parent / "elsewhere", 40, 1.9, seed=2, **SLOW)
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    broken.rename(run / "checkpoints" / "step-40")
    served.wait_until(lambda: any("is corrupt" in line for line in served.printed))
    assert served.post(max_tokens=5).status_code == 200
    assert served.model()["step"] == 20
    write_checkpoint(run, 60, 1.0, seed=3, **SLOW)
    served.wait_until(lambda: served.model()["step"] == 60)
    assert sum("is corrupt" in line for line in served.printed) == 1  # reported once


def unloadable(run, step: int, val_loss: float) -> None:
    """Add a checkpoint that is whole, whose tensors are of another shape than its settings say."""
    odd = write_checkpoint(run.parent / "elsewhere", step, val_loss, seed=2, **SLOW)
    state = json.loads((odd / "state.json").read_text())
    state["settings"]["model"]["n_layer"] = 3
    (odd / "state.json").write_text(json.dumps(state))
    manifest = json.loads((odd / "manifest.json").read_text())
    manifest["files"]["state.json"] = sha256(odd / "state.json")
    (odd / "manifest.json").write_text(json.dumps(manifest))
    odd.rename(run / "checkpoints" / f"step-{step}")


def test_a_whole_checkpoint_that_cannot_be_loaded_is_passed_over(run, served):
    unloadable(run, 40, 1.9)
    served.wait_until(lambda: any("still serving step 20" in line for line in served.printed))
    assert served.post(max_tokens=5).status_code == 200
    write_checkpoint(run, 60, 1.95, seed=3, **SLOW)  # the second best
    served.wait_until(lambda: served.model()["step"] == 60)
    unloadable(run, 80, 1.5)
    write_checkpoint(run, 100, 1.6, seed=3, **SLOW)
    served.wait_until(lambda: served.model()["step"] == 100)
    for step in (40, 80):
        assert sum(f"step-{step} cannot be loaded" in line for line in served.printed) == 1
