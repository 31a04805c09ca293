#!/usr/bin/env bash
# Submit a run to a Ray cluster, and follow it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/submit.sh [--no-wait] CONFIG [KEY=VALUE]...

Wraps `ray job submit`: uploads kdscale and configs (not models, data or runs), and runs
`kdscale train CONFIG cluster.address=auto KEY=VALUE...` on the cluster's head. Follows the run and returns its exit code; `ray job
logs ID` shows it later, `ray job stop ID` lets it save and leave. Submitted again, a run goes on from its newest checkpoint.

environment:
  RAY_API_SERVER_ADDRESS  where jobs are submitted                         (default: http://127.0.0.1:8265)
  RAY_AUTH_TOKEN_PATH     the cluster's token                              (default: ~/.ray/auth_token)
  KDSCALE_FILES           directory on the cluster, shared by its nodes, that relative paths of the config (models,
                          data, runs) start from                           (default: this directory)
  KDSCALE_VENV            environment of launch/install.sh                 (default: .venv)
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
options=()
case "${1:-}" in
  --help | -h) usage; exit 0 ;;
  --no-wait) options+=(--no-wait); shift ;;
esac
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
config="$1"
shift
[[ -f "$config" && "$config" != /* ]] || { echo "$config is no file in $PWD" >&2; exit 2; }

bin="$(cd "${KDSCALE_VENV:-.venv}" && pwd)/bin"
export PATH="$bin:$PATH"
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
# Steps are seen as they come, through a pipe and in a file too.
export PYTHONUNBUFFERED=1
files="${KDSCALE_FILES:-$PWD}"
# What .gitignore names stays here too.
upload='{"working_dir": ".", "excludes": ["/.git", "/recordings", "/tests"]}'
exec ray job submit "${options[@]}" --runtime-env-json "$upload" -- bash launch/job.sh "$files" "$config" "$@"
