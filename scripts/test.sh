#!/usr/bin/env bash
# The gate: every check of the project, cheapest first; stops at the first that fails.
#
#   scripts/test.sh          everything
#   scripts/test.sh --fast   everything but the tests on the real SGLang
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
. scripts/_env.sh

num_stages=7
case ${1-} in
    "") ;;
    --fast) num_stages=6 ;;
    *)
        echo "usage: scripts/test.sh [--fast]" >&2
        exit 2
        ;;
esac

env_setup || {
    echo "FAIL: the environment could not be set up"
    exit 1
}

KVSHARE_GATE_REPORT=$(mktemp) || exit 1
export KVSHARE_GATE_REPORT
trap 'rm -f "$KVSHARE_GATE_REPORT"' EXIT
stage_num=0
num_gpu_skipped=0
num_weights_skipped=0
recap=()

finish() { # VERDICT: the closing lines, alike for success and failure
    echo
    printf '%s\n' "${recap[@]}"
    echo "GPU tests skipped: $num_gpu_skipped"
    echo "real-weights tests skipped: $num_weights_skipped"
    echo "$1"
}

stage() { # TITLE COMMAND...
    local title=$1 start=$SECONDS status counts=()
    shift
    stage_num=$((stage_num + 1))
    echo
    echo "[$stage_num/$num_stages] $title"
    : >"$KVSHARE_GATE_REPORT"
    "$@"
    status=$?
    mapfile -t counts <"$KVSHARE_GATE_REPORT"
    num_gpu_skipped=$((num_gpu_skipped + ${counts[0]:-0}))
    num_weights_skipped=$((num_weights_skipped + ${counts[1]:-0}))
    local line="$((SECONDS - start)) s${counts[2]:+: ${counts[2]}}"
    if ((status)); then
        recap+=("[$stage_num/$num_stages] FAILED  $title, $line")
        finish "FAIL: $title (stage $stage_num of $num_stages, exit status $status, $SECONDS s)"
        exit 1
    fi
    recap+=("[$stage_num/$num_stages] ok      $title, $line")
    echo "[$stage_num/$num_stages] ok in $((SECONDS - start)) s"
}

run_pytest() {
    python -m pytest -p scripts._gate_report --hypothesis-profile=ci \
        --durations=12 --durations-min=10 "$@"
}

# Two workers, each on one thread; who has nothing left takes half of what the other has.
side_by_side=()
_env_has_gpu || side_by_side=(-n 2 --dist worksteal)

real_weights() { # the chat model that a few tests need; without it they are skipped and counted
    echo "SmolLM2-135M-Instruct for tests with real weights (93 MB, fetched once into .cache/models)"
    python -m kvshare_sglang.bench.smollm2 ||
        echo "it is not here (the line above says why): tests that need it are skipped"
}

integration() {
    real_weights
    local workers=()
    if ! _env_has_gpu; then
        local version
        for version in $ENV_OLDER_SGLANG; do # for their smoke tests
            env_other_sglang "$version" >/dev/null || return 1
        done
        # each server runs on one thread; tests/conftest.py puts the longest files first
        workers=(-n 2 --dist loadfile --no-loadscope-reorder)
    fi
    run_pytest "${workers[@]}" tests/integration tests/bench -m "sglang or gpu"
}

stage "format (ruff)" ruff format --check .
stage "lint (ruff)" ruff check .
stage "types (mypy)" mypy
stage "layers" run_pytest tests/test_layers.py
stage "pure tests and doctests" run_pytest "${side_by_side[@]}" tests \
    --ignore=tests/test_layers.py --ignore=tests/kernels --ignore=tests/integration \
    --ignore=tests/bench/gpu -m "not sglang" \
    --doctest-modules kvshare_sglang/{errors,config,plan,sim/useful,bench/common,bench/convert}.py \
    kvshare_sglang/{radix_fuzzy,policy}
stage "kernels against their references" run_pytest "${side_by_side[@]}" tests/kernels
((num_stages > 6)) && stage "the real SGLang" integration

finish "PASS: $num_stages stages in $SECONDS s"
