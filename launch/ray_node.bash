# What launch/ray_head.sh and launch/ray_worker.sh share; sourced by them.

bin="$(cd "${KDSCALE_VENV:-.venv}" && pwd)/bin"
export PATH="$bin:$PATH"
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
export RAY_USAGE_STATS_ENABLED=0
# `ray job stop` is SIGTERM, then SIGKILL: a run saves its checkpoint in between.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-30}"
ray_temp="${KDSCALE_RAY_TEMP:-/tmp/kdscale-ray}"
node_address="${KDSCALE_NODE_ADDRESS:-}"
# This node's address in KDSCALE_NETWORK.
address_here() {
  python -c 'import sys; from kdscale.node import address_in; print(address_in(sys.argv[1])[0])' "$KDSCALE_NETWORK"
}
[[ -n "$node_address" || -z "${KDSCALE_NETWORK:-}" ]] || node_address="$(address_here)"
export KDSCALE_RAY_NODE="$ray_temp"

# A token file that only this user can read, before anything listens.
make_token() {
  mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
  if [[ ! -s "$RAY_AUTH_TOKEN_PATH" ]]; then
    (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
  fi
  # A secret that is mounted read-only may be right already.
  [[ "$(stat -Lc %a "$RAY_AUTH_TOKEN_PATH")" == [46]00 ]] || chmod 600 "$RAY_AUTH_TOKEN_PATH"
}

start_node() {
  local options=(--disable-usage-stats --temp-dir "$ray_temp")
  [[ " $* " != *" --head "* ]] || node_address="${node_address:-127.0.0.1}"
  [[ -z "${KDSCALE_LABELS:-}" ]] || options+=(--labels "$KDSCALE_LABELS")
  [[ -z "${KDSCALE_AGENT_PORT:-}" ]] || options+=(--dashboard-agent-listen-port "$KDSCALE_AGENT_PORT")
  [[ -z "$node_address" ]] || options+=(--node-ip-address "$node_address")
  [[ -z "${KDSCALE_CPUS:-}" ]] || options+=(--num-cpus "$KDSCALE_CPUS")
  [[ -z "${KDSCALE_GPUS:-}" ]] || options+=(--num-gpus "$KDSCALE_GPUS")
  # Nothing of a run's travels through the object store.
  ray start "${options[@]}" --object-store-memory 134217728 "$@" >/dev/null
}

# By a mark that everything started on this node inherits: other clusters on this machine are none of our business.
stop_node() {
  python - "$KDSCALE_RAY_NODE" <<'PY'
import sys
import psutil

def marked():
    for process in psutil.process_iter():
        try:
            if process.environ().get("KDSCALE_RAY_NODE") == sys.argv[1] and process.pid not in spared:
                yield process
        except psutil.Error:
            continue

spared = {psutil.Process().pid, *(parent.pid for parent in psutil.Process().parents())}
for end in (psutil.Process.terminate, psutil.Process.kill):
    found = list(marked())
    for process in found:
        try:
            end(process)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(found, timeout=10)
PY
}
