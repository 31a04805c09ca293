#!/usr/bin/env bash
# Join this node to a Ray cluster that launch/ray_head.sh has started.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/ray_worker.sh HEAD:PORT [--block] | --stop

Joins this node to the head at HEAD:PORT. The head's token must lie in this node's token file (mode 0600) before.

  --block  stay until the node leaves the cluster, or until Ctrl-C or SIGTERM, which stop it
  --stop   stop what this script has started on this node

environment:
  KDSCALE_VENV          environment of launch/install.sh             (default: .venv)
  KDSCALE_NODE_ADDRESS  address of this node, known to the others    (default: Ray's choice)
  KDSCALE_NETWORK       or the network (CIDR) that holds its address
  KDSCALE_CPUS          logical CPUs of this node                    (default: its cores)
  KDSCALE_GPUS          GPUs of this node                            (default: what Ray finds)
  KDSCALE_AGENT_PORT    port of the node's agent                     (default: 52365)
  KDSCALE_LABELS        labels of this node, for instance role=teacher (see teacher.nodes and student.nodes of a config)
  KDSCALE_RAY_TEMP      directory of Ray's sockets and logs          (default: /tmp/kdscale-ray)
  RAY_AUTH_TOKEN_PATH   the token's file                             (default: ~/.ray/auth_token)
TEXT
}

case "${1:-} ${2:-}" in
  "--stop " | *:*" " | *:*" --block") head="$1" ;;
  --help* | -h*) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/ray_node.bash
if [[ "$head" == --stop ]]; then
  stop_node
  exit 0
fi

if [[ ! -s "$RAY_AUTH_TOKEN_PATH" ]]; then
  echo "$RAY_AUTH_TOKEN_PATH holds no token; copy the head's file there, readable by you alone" >&2
  exit 1
fi
if [[ "${2:-}" == --block ]]; then
  trap 'stop_node; exit 143' TERM INT
  start_node --address "$head" --block &
  echo "this node joins the cluster of $head"
  wait $! || true
  stop_node
  exit 1
fi
start_node --address "$head"
echo "this node has joined the cluster of $head"
