#!/bin/sh
# Install the project and its pinned dependencies on a node: what all targets run before Ray.
#
#   sh ~/yuzogpt/cluster/install.sh [EXTRA]     EXTRA: cluster (default), aws, gcp, azure
#
# From ~/yuzogpt (where file_mounts puts the project) into VENV (default ~/yuzogpt-venv). A node
# that was set up from the same pins before, or by an image that brings VENV along, is left alone.
set -eu

extra=${1:-cluster}
venv=${VENV:-$HOME/yuzogpt-venv}
cd "$(dirname "$0")/.."

# The Makefile's stamp, and the SDK that the head's autoscaler needs.
ready=$venv/.ready-$(cat requirements/*.txt pyproject.toml | cksum | cut -d' ' -f1)
[ "$extra" = cluster ] || ready=$ready-$extra

# `ray exec`, `ray down` and the autoscaler say plain `ray` in a login shell, and a submitted job
# says plain `python`. (Ubuntu's .bashrc ends early in shells without a terminal; Ray's have one.)
line="export PATH=\"$venv/bin:\$PATH\" RAY_AUTH_MODE=token"
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >>~/.bashrc

# Ray writes the token for all to read, and file_mounts keeps that mode.
[ ! -e ~/.ray/auth_token ] || chmod 600 ~/.ray/auth_token

if [ -e "$ready" ]; then
    echo "$venv: ready"
    exit
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
    echo "install.sh: $("$python" --version): Python 3.11 to 3.13 is needed; name one by PYTHON" >&2
    exit 1
fi
# torch.compile builds its launchers with a C compiler and Python's headers: cloud images do
# not always have these. At boot, another update may hold the package database.
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
if ! "$python" -c 'import ensurepip' 2>/dev/null || [ ! -e "$headers" ]; then
    if command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then
        sudo apt-get -o DPkg::Lock::Timeout=300 update -qq
        sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq \
            python3-venv python3-dev gcc >/dev/null
    elif ! "$python" -c 'import ensurepip' 2>/dev/null; then
        echo "install.sh: $python cannot make environments; install its venv package" >&2
        exit 1
    fi
fi

"$python" -m venv "$venv"
PYTHON="$venv/bin/python" sh requirements/install.sh "$extra"
rm -f "$venv"/.ready-*
touch "$ready"
echo "$venv: installed"
