#!/usr/bin/env bash
# What launch/submit.sh runs on the cluster, in the directory that was uploaded.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/job.sh FILES CONFIG [KEY=VALUE]...

Runs `kdscale train` on the cluster this job runs on: code and CONFIG (unless it is an absolute path) from the working
directory, relative paths (models, data, runs) from FILES.
TEXT
}

case "${1:-}" in
  --help | -h) usage; exit 0 ;;
esac
[[ $# -ge 2 ]] || { usage >&2; exit 2; }
code="$PWD"
config="$2"
[[ "$config" == /* ]] || config="$code/$config"
cd "$1"
shift 2
PYTHONPATH="$code" exec python -m kdscale.cli train "$config" cluster.address=auto "$@"
