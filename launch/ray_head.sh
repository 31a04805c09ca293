#!/usr/bin/env bash
# Start the head of a Ray cluster on this node, locked by a token.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/ray_head.sh [--stop]

Starts a Ray head that takes only who knows its token. The token lies in a file of mode 0600, made before Ray starts: copy it
to the other nodes (launch/ray_worker.sh) and to where jobs are submitted from (launch/submit.sh). The dashboard, which
takes the jobs, listens on loopback: reach it from elsewhere through ssh -L 8265:127.0.0.1:8265 HEAD.

  --stop   stop what this script has started on this node

environment:
  KDSCALE_VENV          environment of launch/install.sh             (default: .venv)
  KDSCALE_NODE_ADDRESS  address of this node, known to the others    (default: 127.0.0.1: no other node can join)
  KDSCALE_NETWORK       or the network (CIDR) that holds its address
  KDSCALE_RAY_PORT      port of the head                             (default: 6379)
  KDSCALE_JOBS_PORT     port that takes jobs, on loopback            (default: 8265)
  KDSCALE_AGENT_PORT    port of the node's agent                     (default: 52365)
  KDSCALE_CPUS          logical CPUs of this node                    (default: its cores)
  KDSCALE_GPUS          GPUs of this node                            (default: what Ray finds)
  KDSCALE_LABELS        labels of this node, for instance role=teacher (see teacher.nodes and student.nodes of a config)
  KDSCALE_RAY_TEMP      directory of Ray's sockets and logs          (default: /tmp/kdscale-ray)
  RAY_AUTH_TOKEN_PATH   the token's file                             (default: ~/.ray/auth_token)
TEXT
}

case "${1:-}" in
  "" | --stop) ;;
  --help | -h) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/ray_node.bash
if [[ "${1:-}" == --stop ]]; then
  stop_node
  exit 0
fi

jobs_port="${KDSCALE_JOBS_PORT:-8265}"
make_token
start_node --head --port "${KDSCALE_RAY_PORT:-6379}" --dashboard-host 127.0.0.1 --dashboard-port "$jobs_port"
# The agent that takes jobs comes up some seconds after the head.
for _ in {1..30}; do
  if ray job submit --address "http://127.0.0.1:$jobs_port" -- true >"$ray_temp/first-job.log" 2>&1; then
    ready=yes
    break
  fi
  sleep 2
done
[[ -n "${ready:-}" ]] || { echo "the head takes no jobs; see $ray_temp/first-job.log" >&2; exit 1; }
echo "the head listens at $node_address:${KDSCALE_RAY_PORT:-6379}; its token is in $RAY_AUTH_TOKEN_PATH"
echo "next: bash launch/submit.sh configs/quickstart.yaml"
