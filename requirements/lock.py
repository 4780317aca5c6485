"""Writes requirements/*.txt: every package that an extra installs, with the hashes of its files.

    pip install packaging uv && python requirements/lock.py

In: pyproject.toml, and the versions in constraints.txt (which may lack those of new packages). Out:
a file for each extra, and core.txt for none; each has what those that it begins with do not have.
torch.txt has PyPI's torch and CUDA's libraries; torch-cpu.txt, a build without them, is kept by
hand. Hashes are those of files for CPython 3.11 to 3.13 on Linux and on Apple's own processors.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.markers import Marker

HERE = Path(__file__).parent
PROJECT = HERE.parent
# The files of an extra, and those that each begins with.
EXTRAS = {
    "build": (),
    "core": ("build",),
    "wandb": ("core",),
    "harness": ("core",),
    "cluster": ("wandb",),
    "aws": ("cluster",),
    "gcp": ("cluster",),
    "azure": ("cluster",),
    "dev": ("aws", "gcp", "harness"),
    "docs": (),
}
GROUPS = ("docs",)  # dependency groups of pyproject.toml: without the project and what it needs
TORCH = re.compile(r"torch$|triton$|nvidia-|cuda-")
BUILD = "setuptools\n"  # builds the project itself, and packages that come as source only
PLATFORMS = [
    {
        "python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0", "os_name": "posix",
        "sys_platform": system, "platform_system": system.title(), "platform_machine": machine,
        "implementation_name": "cpython", "platform_python_implementation": "CPython", "extra": "",
    }
    for minor in (11, 12, 13)
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]  # fmt: skip
PYTHON = re.compile(r"cp311|cp312|cp313|cp3\d-abi3|cp31[0-3]-abi3|py3|py31[123]|py2\.py3")
SYSTEM = re.compile(r"any|.*(manylinux\w*_(x86_64|aarch64)|macosx_\d+_\d+_(arm64|universal2))")


def main() -> None:
    """Write all files."""
    found = {name: resolved(name) for name in EXTRAS}
    known: dict[str, set[str]] = {}
    torch = {name: entry for name, entry in found["core"].items() if TORCH.match(name)}
    for extra, bases in EXTRAS.items():
        inherited = set(torch).union(*(known[base] for base in bases))
        own = {name: entry for name, entry in found[extra].items() if name not in inherited}
        known[extra] = inherited | set(own)
        write(extra, [f"-r {base}.txt\n" for base in bases], own)
    write("torch", [], torch)


def resolved(extra: str) -> dict[str, str]:
    """Return the entry of each package that an extra installs."""
    if extra in GROUPS:
        sources, flags = [], [f"--group={extra}"]
    else:
        sources = ["-"] if extra == "build" else ["-", "pyproject.toml"]
        flags = [] if extra in ("build", "core") else [f"--extra={extra}"]
    flags += ["--universal", "--python-version=3.11", "--no-header", "--format=pylock.toml"]
    done = subprocess.run(
        ["uv", "pip", "compile", "--quiet", "--constraints=constraints.txt", *flags, *sources],
        cwd=PROJECT, input=BUILD, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    packages = tomllib.loads(done.stdout)["packages"]
    lines = {package["name"]: lines_of(package) for package in packages if "version" in package}
    return {name: text for name, text in lines.items() if text}


def lines_of(package: dict[str, Any]) -> str:
    """Return a package's pin and hashes; nothing if no supported platform installs it."""
    marker = Marker(package["marker"]) if "marker" in package else None
    fits = [marker is None or marker.evaluate(platform) for platform in PLATFORMS]
    if not any(fits):
        return ""
    condition = "" if all(fits) else f" ; {marker}"
    wheels = [wheel for wheel in package.get("wheels", []) if is_supported(wheel["url"])]
    files = wheels or [package["sdist"]]
    hashes = sorted(file["hashes"]["sha256"] for file in files)
    pin = f"{package['name']}=={package['version']}{condition}"
    return " \\\n    ".join([pin, *(f"--hash=sha256:{value}" for value in hashes)]) + "\n"


def is_supported(url: str) -> bool:
    """Return whether a wheel is for a supported platform."""
    python, abi, system = url.rpartition("/")[2].removesuffix(".whl").split("-")[-3:]
    is_python = PYTHON.fullmatch(f"{python}-abi3" if abi == "abi3" else python)
    return bool(is_python and abi[-1] != "t" and SYSTEM.fullmatch(system))


def write(name: str, begin: list[str], entries: dict[str, str]) -> None:
    """Write one file."""
    header = "# Made by requirements/lock.py.\n"
    text = header + "".join(begin) + "".join(entries[one] for one in sorted(entries))
    (HERE / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
