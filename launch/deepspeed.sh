#!/usr/bin/env bash
# Train on this host under the DeepSpeed launcher, without Ray, from a teacher that is served elsewhere.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/deepspeed.sh CONFIG --teacher-endpoints FILE [OPTION]... [KEY=VALUE]...

Runs kdscale.worker under `deepspeed` on as many ranks as student.parallel has, and watches them: Ctrl-C or SIGTERM lets them
save and leave, the exit code is theirs, and none is left. The same command goes on from the newest checkpoint.

On several hosts, run it on each of them with the same hostfile (lines `HOST slots=RANKS`), in place of ssh:
  --hostfile FILE --node_rank LINE --master_addr ADDRESS [--master_port PORT]
ADDRESS is the first host's, in stream.network of the config. All options: kdscale launch --help

environment:
  KDSCALE_VENV   environment of launch/install.sh   (default: .venv)
TEXT
}

case "${1:-}" in
  --help | -h) usage; exit 0 ;;
  "") usage >&2; exit 2 ;;
esac

# Files of this directory, or else of kdscale's.
arguments=()
for argument in "$@"; do
  [[ "$argument" == /* || ! -f "$argument" ]] || argument="$PWD/$argument"
  arguments+=("$argument")
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${KDSCALE_VENV:-.venv}/bin/kdscale" launch "${arguments[@]}"
