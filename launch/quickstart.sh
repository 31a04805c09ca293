#!/usr/bin/env bash
# The main job from nothing, on a laptop: install, fetch a real teacher and real text, distil, measure.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/quickstart.sh [CONFIG] [KEY=VALUE]...

Installs kdscale, fetches the teacher SmolLM2-135M-Instruct and the Python reference as text, and runs
`kdscale train CONFIG KEY=VALUE...` (default: configs/quickstart.yaml). Interrupted and started again, it goes on.

environment: see `bash launch/install.sh --help`
TEXT
}

case "${1:-}" in
  --help | -h) usage; exit 0 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
config="configs/quickstart.yaml"
if [[ $# -gt 0 && "$1" != *=* ]]; then
  config="$1"
  shift
fi
bash launch/install.sh
venv="${KDSCALE_VENV:-.venv}"
"$venv/bin/python" launch/prepare_quickstart.py
exec "$venv/bin/kdscale" train "$config" "$@"
