#!/usr/bin/env bash
# Install kdscale and pass all its tests, from nothing.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/test.sh [PYTEST OPTION]...

Installs what is missing, runs style and type checks, then every test: fast ones first, then those with real Ray clusters
and several ranks. Options go to pytest, for instance: bash launch/test.sh -k packing

environment: see `bash launch/install.sh --help`
TEXT
}

case "${1:-}" in
  --help | -h) usage; exit 0 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh --test
bin="$(cd "${KDSCALE_VENV:-.venv}" && pwd)/bin"
export PATH="$bin:$PATH"
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
