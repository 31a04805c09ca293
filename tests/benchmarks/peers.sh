#!/usr/bin/env bash
# Make the environment in which the peers' sides of the benchmarks run.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash tests/benchmarks/peers.sh

Makes a virtual environment with TRL (its GKDTrainer) and Liger (its chunked losses), apart from kdscale's own, with the same
torch and transformers. Benchmarks take its interpreter: --peers .venv-peers/bin/python

environment:
  KDSCALE_PEERS_VENV   where the environment lies   (default: .venv-peers)
  KDSCALE_PYTHON       a Python 3.11 or 3.12        (default: python3)
TEXT
}

case "${1:-}" in
  "") ;;
  --help | -h) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv="${KDSCALE_PEERS_VENV:-.venv-peers}"
[[ -x "$venv/bin/python" ]] || "${KDSCALE_PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -q)
pinned() { grep -E "^($1)==" launch/constraints.txt; }
mapfile -t same < <(pinned "transformers|accelerate|datasets|safetensors|numpy|pyarrow")
"${pip[@]}" "$(pinned torch)"
"${pip[@]}" "${same[@]}" trl==1.16.0
# Liger asks for triton, which its losses need to import, not to run on a CPU.
"${pip[@]}" --no-deps liger-kernel==0.8.5 triton==3.7.1
"$venv/bin/python" -c "import trl, liger_kernel.chunked_loss; print('trl', trl.__version__)"
