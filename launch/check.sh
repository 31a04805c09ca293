#!/usr/bin/env bash
# Before each commit: style, types, layers, fast tests.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/check.sh

Runs ruff, mypy and the fast tests (the layer test among them) in the environment of launch/install.sh.

environment: see `bash launch/install.sh --help`
TEXT
}

case "${1:-}" in
  "") ;;
  --help | -h) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh --test
bin="$(cd "${KDSCALE_VENV:-.venv}" && pwd)/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/python" -m pytest -q -m "not slow"
