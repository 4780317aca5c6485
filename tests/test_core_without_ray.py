"""The core imports, trains and samples where ray cannot be imported; only one folder imports it."""

import ast
import os
import subprocess
import sys

from tests.conftest import REPOSITORY, TINY

BLOCKED = """
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ImportError("ray is blocked")

sys.meta_path.insert(0, NoRay())
from yuzogpt.cli import main
main(sys.argv[1:])
"""


def imported(path):
    """Yield the name of every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_only_orchestration_imports_ray():
    guilty = [
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "yuzogpt").rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imported(path))
    ]
    assert guilty
    assert all(name.startswith("yuzogpt/orchestration/") for name in guilty)


# Each may import only what stands before it on the line through the house.
LINE = [
    [
        "errors",
        "files",
        "filesystems",
        "storage",
        "tensor_files",
        "config",
        "cores",
        "overrides",
        "paths",
        "quantities",
        "ranks",
        "signals",
        "lease",
        "memory",
        "mirrors",
        "tokenizers",
        "tokenizer_files",
        "terminal",
    ],
    ["metrics", "world", "network"],
    ["data", "hardware", "model"],
    ["checkpoints", "stored_checkpoints", "references", "loading", "preflight", "runs"],
    ["sampling", "evaluation", "report", "doctor", "export"],
    ["training"],
    ["tuning", "serving", "bench"],
    ["orchestration"],
    ["verbs"],
    ["cli", "__main__"],
]


def test_nothing_flows_backwards():
    place = {name: number for number, names in enumerate(LINE) for name in names}
    package = REPOSITORY / "yuzogpt"
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room == "__init__" or path.name == "__main__.py":
            continue
        for name in imported(path):
            if name.startswith("yuzogpt."):
                assert place[name.split(".")[1]] <= place[room], f"{path} imports {name}"


def test_it_trains_where_ray_is_blocked(corpus_dir, tmp_path):
    places = [f"--data_dir={corpus_dir}", f"--out_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", BLOCKED, "train", *TINY, *places]
    result = subprocess.run(
        [*command, "--num_workers=0", "--max_iters=3"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "step 3: val loss" in result.stdout
