#!/bin/sh
# Install the project as it was tested: every package is pinned, and checked against its SHA-256.
#
#   sh requirements/install.sh [EXTRA]     EXTRA: one of pyproject.toml's; default: none (core.txt)
#
# Into the environment of PYTHON (default: python). The project itself stays where it is (editable).
set -eu

cd "$(dirname "$0")/.."
python=${PYTHON:-python}
install() {
    "$python" -m pip install --quiet --no-deps --no-build-isolation --use-pep517 "$@"
}

# What builds packages is checked, too: so it is not left to pip.
install --require-hashes -r requirements/build.txt
torch=torch
if install --dry-run --require-hashes -r requirements/torch-cpu.txt 2>/dev/null; then
    torch=torch-cpu
fi
install --require-hashes -r "requirements/$torch.txt" -r "requirements/${1:-core}.txt"
install --editable .
"$python" -m pip check
