"""Commands that the configs, manifests and cluster/README.md show: each of them parses."""

import re
import shlex
import shutil
import tomllib
import zipfile

import pytest

from tests.cluster.rules import CLUSTER
from tests.conftest import REPOSITORY
from yuzogpt.cli import main

FILES = [path for path in sorted(CLUSTER.rglob("*")) if path.is_file()]
JOB = re.compile(r"python (?:/opt/yuzogpt/)?(jobs/\w+\.py)((?: [^\s)`']+)*)")
RAY = re.compile(r"ray (up|down|dashboard|exec|job submit) ([^\n`)]*)")


def commands(pattern: re.Pattern[str]) -> list[tuple[str, str, str]]:
    """Return (file, program, arguments) for each command that some file shows."""
    texts = {path.name: re.sub(r"\\\n#? *", "", path.read_text()) for path in FILES}
    return [
        (name, *match.groups()) for name, text in texts.items() for match in pattern.finditer(text)
    ]


@pytest.mark.parametrize(("file", "job", "arguments"), commands(JOB))
def test_job_parses(file, job, arguments, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (verb,) = re.findall(r'run\(\["(\w+)", ', (REPOSITORY / job).read_text())
    main([verb, *shlex.split(arguments), "--dry_run"])
    assert "\n" in capsys.readouterr().out


def test_every_target_shows_a_job():
    shown = {file for file, job, _ in commands(JOB) if job == "jobs/train_gpt2.py"}
    targets = {"aws.yaml", "gcp.yaml", "azure.yaml", "rayjob-train-gpt2.yaml", "README.md"}
    assert targets <= shown


def test_a_target_takes_ten_lines_at_most():
    text = (CLUSTER / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    everywhere, *targets = [block.splitlines() for block in blocks]
    assert len(targets) == 5
    assert all(len(everywhere) + len(target) <= 10 for target in targets)


def test_a_flag_that_does_not_exist_is_found(capsys):
    from yuzogpt.errors import UserError

    with pytest.raises(UserError, match="num_worker"):
        main(["train", "gpt2_124m", "--num_worker=8", "--dry_run"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
@pytest.mark.parametrize(("file", "program", "arguments"), commands(RAY))
def test_ray_takes_the_command(file, program, arguments):
    from ray.dashboard.modules.job.cli import submit
    from ray.scripts import scripts

    words = shlex.split(arguments.partition("#")[0].partition(" & until")[0])
    if program == "job submit":
        submit.make_context("submit", words)
        return
    getattr(scripts, program).make_context(program, list(words))
    (config,) = (word for word in words if word.endswith(".yaml"))
    assert (REPOSITORY / config).exists()


def test_a_job_takes_the_project_along_and_no_more(tmp_path):
    """`--working-dir .`: each submission sends it, and Ray refuses what is large."""
    from ray._private.runtime_env.packaging import create_package

    project, package = tmp_path / "project", tmp_path / "package.zip"
    needed = {"jobs/train_gpt2.py", "yuzogpt/data/blocks.py", "yuzogpt/serving/page/index.html",
              "yuzogpt/config/presets/gpt2_124m.yaml", "mine.yaml"}  # fmt: skip
    left = {".git/index", ".venv/bin/ray", "data/a/train-00000.arrow", "out-1/metrics.jsonl",
            "my-gpt2/model.safetensors", "model.gguf", "a", "api_keys", "my_api_keys.txt", ".env",
            "yuzogpt/api_keys", "jobs/__pycache__/a.pyc", "yuzogpt/__pycache__/b.pyc", "wandb/a",
            "text.txt", ".ray/auth_token", "auth_token", "eval-gpt2/results.json", "yuzogpt-venv/a",
            "benchmarks/figures.json", "tests/data/test.py", "deep/yuzogpt/a.py"}  # fmt: skip
    for name in needed | left:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    shutil.copy(REPOSITORY / ".rayignore", project)
    create_package(str(project), package, include_gitignore=False)
    sent = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert sent == needed
    # A clone takes all that a job imports, and little else.
    create_package(str(REPOSITORY), tmp_path / "clone.zip", include_gitignore=True)
    sent = {name for name in zipfile.ZipFile(tmp_path / "clone.zip").namelist() if name[-1] != "/"}
    code = {path.relative_to(REPOSITORY).as_posix() for path in code_of_a_job()}
    assert sent == code
    assert (tmp_path / "clone.zip").stat().st_size < 2e6


def code_of_a_job():
    """Yield what setuptools would install, and the jobs."""
    yield from (REPOSITORY / "jobs").glob("*.py")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    for pattern in ("*.py", *project["tool"]["setuptools"]["package-data"]["yuzogpt"]):
        yield from (REPOSITORY / "yuzogpt").rglob(pattern)
