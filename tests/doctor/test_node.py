"""What a node knows of itself, where parts of it cannot be found out."""

import os

import pytest

from yuzogpt.doctor import node
from yuzogpt.doctor.display import show
from yuzogpt.doctor.survey import Survey

LINE = "NVIDIA H100 80GB HBM3, 81559, 1200, 0, 0, 570.86\n"
STRAY = "WARNING: infoROM is corrupted at gpu 0000:3B:00.0"
H100 = node.Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, 1200 * 2**20, 0.0, 0, "570.86")


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts a program in nvidia-smi's place."""

    def write(output, errors="", status=0):
        (tmp_path / "out").write_bytes(output if isinstance(output, bytes) else output.encode())
        (tmp_path / "err").write_text(errors)
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\ncat {tmp_path}/out\ncat {tmp_path}/err >&2\nexit {status}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return write


@pytest.mark.parametrize(
    ("output", "errors", "status", "expected"),
    [
        (LINE * 2, "", 0, ([H100, H100], "", [])),
        (f"{LINE}{STRAY}\n", "", 14, ([H100], "", [STRAY])),  # its status for that
        (f"{STRAY}\n\n{LINE}", "", 0, ([H100], "", [STRAY])),
        (LINE, f"{STRAY}\n", 14, ([H100], "", [STRAY])),
        ("a, b, c, d, e, f\n" + LINE, "", 0, ([H100], "", ["a, b, c, d, e, f"])),
        (b"\xff\n" + LINE.encode(), "", 0, ([H100], "", ["\ufffd"])),
        ("", "NVIDIA-SMI has failed\n", 9, ([], "nvidia-smi fails: NVIDIA-SMI has failed", [])),
        ("", "", 9, ([], "nvidia-smi fails: status 9", [])),
        ("No devices were found\n", "", 0, ([], "", ["No devices were found"])),
    ],
)
def test_a_stray_line_of_nvidia_smi_costs_no_gpu(nvidia_smi, output, errors, status, expected):
    nvidia_smi(output, errors, status)
    assert node.examine_gpus() == expected


@pytest.mark.parametrize("value", ["[N/A]", "[Not Supported]", "nan", "1e999"])
def test_what_nvidia_smi_does_not_know(nvidia_smi, value):
    nvidia_smi(f"GB10, [N/A], [N/A], [N/A], {value if value[0] == '[' else '[N/A]'}, 580\n")
    ([gpu], _, _) = node.examine_gpus()
    assert (gpu.memory, gpu.busy, gpu.errors) == (0, None, None)
    assert node.number(value) is None


def test_a_part_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "getloadavg", fail)
    monkeypatch.setattr(node, "free_memory", fail)
    found = node.examine("127.0.0.1", str(tmp_path / "gone"), 0)
    assert set(found.problems) == {"load", "memory", "disk"}
    assert "Input/output error" in found.problems["load"]
    assert found.versions["torch"]
    assert found.cores >= 1
    show(Survey(nodes={"here": found}), [])
    assert capsys.readouterr().out.count("?") >= 3
