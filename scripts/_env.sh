# Sourced by the other scripts: makes the environment that they run in.
#
#   env_setup                  make or reuse .venv, put it first on PATH, set SGLang's variables
#   env_other_sglang VERSION   another SGLang in a folder of its own; prints that folder
#   env_aiperf                 the client of load tests in .venv/aiperf, an environment of its own
#   env_bench_serving          what sglang.benchmark.serving needs beside SGLang, in .venv
#
# All fail after saying what went wrong.
# pip uses whatever index it is configured with (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf).
# PYTHON=/path/to/python chooses the interpreter. Progress goes to stderr.

ENV_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ENV_VENV=$ENV_ROOT/.venv
ENV_STAMP=$ENV_VENV/kvshare-stamp
ENV_LOG=$ENV_VENV/setup.log
ENV_SGLANG=0.5.23                # the version served in full; cpu-nodeps.txt names it too
ENV_OLDER_SGLANG="0.5.17 0.5.21" # smoke-tested: the last for torch 2.11, the last before 0.5.22

_env_say() { echo "[env] $*" >&2; }

_env_die() {
    echo "[env] ERROR: $1" >&2
    shift
    local line
    for line in "$@"; do echo "[env]   $line" >&2; done
    exit 1
}

_env_has_gpu() { nvidia-smi -L 2>/dev/null | grep -q GPU; }

# The first interpreter that really runs, is >= 3.11 and < 3.14, and can make environments.
# A name on PATH is no proof: version managers put names there that only print an error.
_env_find_python() {
    local candidate version found=()
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        version=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || version=
        case $version in
            3.11.* | 3.12.* | 3.13.*)
                if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                    echo "$candidate"
                    return
                fi
                found+=("$candidate is $version without the venv module (Debian, Ubuntu: apt install python${version%.*}-venv)")
                ;;
            "") [[ $candidate == "${PYTHON:-}" ]] && found+=("$candidate does not run") ;;
            *) found+=("$candidate is $version") ;;
        esac
        [[ $candidate == "${PYTHON:-}" ]] && break # a chosen one is not silently replaced
    done
    ((${#found[@]})) || found=("no python3 found on PATH")
    _env_die "Python 3.11, 3.12 or 3.13 is needed. Tried:" "${found[@]}" \
        "Install one, or name it: PYTHON=/path/to/python3.11 $0"
}

# _env_step TITLE COMMAND...: run it into the log, saying every ten seconds where it stands.
_env_step() {
    local title=$1 start=$SECONDS pid
    shift
    _env_say "$title"
    echo "== $title: $*" >>"$ENV_LOG"
    "$@" >>"$ENV_LOG" 2>&1 9>&- &
    pid=$!
    # background jobs of a script ignore Ctrl-C, so pass it on
    trap "kill $pid 2>/dev/null; exit 130" INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        (((SECONDS - start) % 10 == 9)) &&
            _env_say "  $((SECONDS - start)) s: $(tail -n 1 "$ENV_LOG" | tr -d '\r' | cut -c 1-90)"
    done
    trap - INT TERM
    wait "$pid" && return
    echo >&2
    tail -n 8 "$ENV_LOG" | cut -c 1-300 | sed 's/^/[env]   | /' >&2
    local hint="See the log for the cause."
    grep -q -E 'Could not find a version|NewConnectionError|name resolution|Network is unreachable|Read timed out|ConnectTimeout|Connection refused' \
        <(tail -n 40 "$ENV_LOG") &&
        hint="pip could not fetch a package: check the network, and PIP_INDEX_URL if you use another index."
    grep -q 'No space left' <(tail -n 40 "$ENV_LOG") &&
        hint="The disk is full: about 2 GB are needed (more with torch for CUDA)."
    _env_die "this step failed: $title" "$hint" "Log: $ENV_LOG"
}

_env_pip() { _env_step "$1" "$ENV_VENV/bin/python" -m pip --disable-pip-version-check install --progress-bar off "${@:2}"; }

# What the environment is made from; another text here means that it must be made anew.
_env_fingerprint() {
    (
        cd "$ENV_ROOT" || exit
        _env_has_gpu && echo gpu || echo cpu
        cat scripts/_env.sh setup.py requirements/*.txt scripts/cpu_shim/*.py
    ) | sha256sum | cut -d ' ' -f 1
}

_env_make() {
    cd "$ENV_ROOT" || exit
    rm -f "$ENV_STAMP"
    : >"$ENV_LOG"
    if ! "$ENV_VENV/bin/python" -c 'import sys, pip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>>"$ENV_LOG"; then
        local python
        python=$(_env_find_python) || exit 1
        rm -rf "$ENV_VENV"/{bin,include,lib,lib64,pyvenv.cfg} # of a Python that is gone or too old
        _env_step "making .venv with $("$python" -V 2>&1)" "$python" -m venv "$ENV_VENV"
    fi
    if _env_has_gpu; then
        _env_pip "installing SGLang $ENV_SGLANG for the GPU, and this package (several GB the first time)" \
            -e ".[gpu,bench,dev]" "sglang==$ENV_SGLANG"
    else
        _env_say "no GPU here (nvidia-smi): installing for the CPU"
        _env_pip "1/4 installing torch and the pinned packages (a minute or more)" \
            -r requirements/cpu.txt -c requirements/cpu-constraints.txt
        _env_pip "2/4 installing SGLang $ENV_SGLANG without its CUDA packages" \
            --no-deps -r requirements/cpu-nodeps.txt
        _env_pip "3/4 installing the stand-ins that SGLang needs on a CPU" \
            --no-deps --no-build-isolation --force-reinstall ./scripts/cpu_shim
        _env_pip "4/4 installing this package" --no-deps --no-build-isolation -e .
        _env_step "checking that SGLang starts" env SGLANG_USE_CPU_ENGINE=1 \
            "$ENV_VENV/bin/python" -c "import sglang.launch_server"
    fi
    _env_fingerprint >"$ENV_STAMP"
    _env_say "environment ready after $SECONDS s"
}

# Runs COMMAND alone: two scripts started together do not both install.
_env_locked() {
    mkdir -p "$ENV_VENV" || _env_die "cannot write in $ENV_ROOT"
    (
        if command -v flock >/dev/null; then
            flock -n 9 || { _env_say "waiting for another set-up to end" && flock 9; }
        fi
        "$@"
    ) 9>"$ENV_VENV/lock"
}

_env_make_once() { [[ $(cat "$ENV_STAMP" 2>/dev/null) == "$(_env_fingerprint)" ]] || _env_make; }

env_setup() {
    _env_locked _env_make_once || return
    export VIRTUAL_ENV=$ENV_VENV PATH=$ENV_VENV/bin:$PATH
    export TOKENIZERS_PARALLELISM=false
    # nothing here downloads models: all are made on the spot
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1}
    if ! _env_has_gpu; then
        export SGLANG_USE_CPU_ENGINE=1
        # more OpenMP threads than free cores make decoding collapse
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    fi
}

_env_make_other() {
    [[ -f $2/.complete ]] && return
    _env_pip "installing SGLang $1 beside the main one" --no-deps --upgrade --target "$2" "sglang==$1"
    touch "$2/.complete"
}

env_other_sglang() {
    local target=$ENV_VENV/sglang-$1
    _env_locked _env_make_other "$1" "$target" || return
    echo "$target"
}

_env_make_aiperf() {
    local target=$ENV_VENV/aiperf
    cmp -s "$ENV_ROOT/requirements/aiperf-constraints.txt" "$target/.complete" && return
    rm -rf "$target"
    _env_step "making .venv/aiperf" "$ENV_VENV/bin/python" -m venv "$target"
    _env_step "installing aiperf (a minute or more)" \
        "$target/bin/python" -m pip --disable-pip-version-check install --progress-bar off \
        -r requirements/aiperf.txt -c requirements/aiperf-constraints.txt
    cp requirements/aiperf-constraints.txt "$target/.complete"
}

env_aiperf() { _env_locked _env_make_aiperf; }

_env_make_bench_serving() {
    "$ENV_VENV/bin/python" -c 'import datasets' 2>/dev/null && return
    _env_pip "installing what sglang.benchmark.serving needs" -r requirements/bench-serving.txt
}

env_bench_serving() { _env_locked _env_make_bench_serving; }
