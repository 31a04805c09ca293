#!/usr/bin/env bash
# Install kdscale and pass all its tests, from nothing.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/test.sh [PYTEST OPTION]...

Installs what is missing, runs style and type checks, then every test: fast ones first, then those with real Ray clusters
and several ranks, two files at a time. Options go to pytest, once for each kind of test, for instance:
bash launch/test.sh -k packing

environment:
  KDSCALE_TEST_PROCESSES  how many files of tests run at a time (default: 2; each may have a cluster of three or four ranks;
                          0 runs them in pytest's own process, as --pdb needs)
  others                  see `bash launch/install.sh --help`
TEXT
}

case "${1:-}" in
  --help | -h) usage; exit 0 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh --test
bin="$(cd "${KDSCALE_VENV:-.venv}" && pwd)/bin"
export PATH="$bin:$PATH"
ruff check .
ruff format --check .
mypy

# Ranks are nicer than fast tests, which would leave them no processor: the kinds run one after the other.
found=0 failed=0
for kind in "not slow" "alone" "slow and not alone"; do
  code=0
  processes=0
  [[ "$kind" == alone ]] || processes="${KDSCALE_TEST_PROCESSES:-2}"
  python -m pytest -m "$kind" -n "$processes" --dist loadfile "$@" || code=$?
  case "$code" in
    0) found=1 ;;
    5) echo "no test that is $kind" ;;  # pytest's word for an empty selection
    1) failed=1 ;;
    *) exit "$code" ;;
  esac
done
[[ "$failed" == 0 && "$found" == 1 ]]
