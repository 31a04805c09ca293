#!/usr/bin/env bash
# The main job from nothing, on a laptop: install, fetch a real teacher and real text, distil, measure.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/quickstart.sh [--inputs | CONFIG] [KEY=VALUE]...

Installs kdscale, fetches the teacher SmolLM2-135M-Instruct and the Python reference as text, and runs
`kdscale train CONFIG KEY=VALUE...` (default: configs/quickstart.yaml). Interrupted and started again, it goes on.

  --inputs   install and fetch only: what benchmarks, submitted runs and other configs start from

environment: see `bash launch/install.sh --help`
TEXT
}

case "${1:-}" in
  --help | -h) usage; exit 0 ;;
esac

config="configs/quickstart.yaml"
inputs_only=""
if [[ "${1:-}" == --inputs ]]; then
  inputs_only=yes
elif [[ $# -gt 0 && "$1" != *=* ]]; then
  # Of this directory, or else of kdscale's.
  config="$1"
  [[ "$config" == /* || ! -f "$config" ]] || config="$PWD/$config"
  shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh
venv="${KDSCALE_VENV:-.venv}"
"$venv/bin/python" launch/prepare_quickstart.py
[[ -z "$inputs_only" ]] || exit 0
exec "$venv/bin/kdscale" train "$config" "$@"
