#!/usr/bin/env bash
# One visit to a GPU machine that may be short, and without network: pack here, run there.
#
#   scripts/gpu_visit.sh pack CARRY_DIR [--kit DIR]    lay out what must travel, and count it first
#   scripts/gpu_visit.sh run OUT [options]             measure and check; OUT/summary.json tells
#
# Each has --help; docs/gpu_visit.md says what a visit measures and in which order.
# Uses the first Python 3.11 or newer that has torch: $PYTHON, python3, the one in .venv (packing
# does without torch). Everything else, SGLang included, may come from a kit.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1

fits() { # PYTHON: whether it is new enough, and has torch where that is needed
    local code='import sys, importlib.util as u; sys.exit(sys.version_info < (3, 11) or sys.argv[1] == "run" and u.find_spec("torch") is None)'
    "$1" -c "$code" "$command" 2>/dev/null
}

command=${1:-}
for candidate in ${PYTHON:+"$PYTHON"} python3 "$root/.venv/bin/python"; do
    fits "$candidate" &&
        PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$candidate" -m kvshare_sglang.bench.gpu_visit "$@"
    [[ $candidate == "${PYTHON:-}" ]] && break # a chosen one is not silently replaced
done
echo "[gpu_visit] ERROR: no Python from 3.11 on that has torch (tried ${PYTHON:-python3 and .venv/bin/python})." >&2
echo "[gpu_visit]        Name one: PYTHON=/path/to/python $0 $*" >&2
exit 1
