#!/usr/bin/env bash
# Make a virtual environment and install kdscale with pinned requirements.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/install.sh [--test]

Makes a virtual environment with kdscale in it; does nothing when it is up to date.

  --test    also install what the tests and checks need: Python packages, and as root strace, with apt-get where it is
            missing (without it the test that kills a save at sampled system calls is skipped)

environment:
  KDSCALE_VENV         where the environment lies          (default: .venv)
  KDSCALE_PYTHON       a Python 3.11 or 3.12               (default: the first of python3.12, python3.11, python3)
  KDSCALE_TORCH_INDEX  package index torch is taken from   (default: PyTorch's CPU index where no GPU is found)
TEXT
}

extras="gguf"
case "${1:-}" in
  "") ;;
  --test) extras="gguf,test" ;;
  --help | -h) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${KDSCALE_VENV:-.venv}"
cpu_index="https://download.pytorch.org/whl/cpu"

# Debian's Python has venv, but ensurepip, by which venv installs pip, is in a package of its own.
find_python() {
  for candidate in ${KDSCALE_PYTHON:+"$KDSCALE_PYTHON"} python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "kdscale needs Python 3.11 or 3.12 with venv and ensurepip (Debian, Ubuntu: python3-venv); set KDSCALE_PYTHON to one" >&2
  exit 1
}

torch_index() {
  if [[ -n "${KDSCALE_TORCH_INDEX:-}" ]]; then
    echo "$KDSCALE_TORCH_INDEX"
  elif ! command -v nvidia-smi >/dev/null && "$venv/bin/python" - "$cpu_index" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=3)
except OSError:
    sys.exit(1)
PY
  then
    echo "$cpu_index"
  fi
}

install_strace() {
  command -v strace >/dev/null && return
  if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    echo "installing strace"
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends strace; } >/dev/null && return
  fi
  echo "strace is missing and could not be installed: the test that kills a save at sampled system calls is skipped" >&2
}

[[ "$extras" == *test* ]] && install_strace
stamp="$venv/.kdscale-installed"
state="$extras $(cat pyproject.toml launch/constraints.txt | sha256sum)"
installed="$(cat "$stamp" 2>/dev/null || true)"
# What the tests need holds all that a user needs.
if [[ "$installed" == "$state" || "$installed" == "${state/gguf /gguf,test }" ]]; then
  exit 0
fi

# One without pip is what an interrupted or failed venv leaves.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$(find_python)" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c launch/constraints.txt)
index="$(torch_index)"
echo "installing torch"
# torch comes first: other packages' build steps look at it, and an open range would take a build for another device.
"${pip[@]}" -q torch ${index:+--extra-index-url "$index"}
echo "installing kdscale[$extras] and its requirements"
"${pip[@]}" -q -e ".[$extras]"
echo "$state" >"$stamp"
