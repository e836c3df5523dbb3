#!/usr/bin/env bash
# Check kvshare on a GPU, in one go; every step leaves a JSON file in OUT.
#
#   scripts/gpu_check.sh OUT [options]    see: scripts/gpu_check.sh --help
#
# Uses the Python that has SGLang: $PYTHON, else python3, else the one in .venv (scripts/_env.sh
# makes that; or pip install -e .[gpu]). Installs nothing: what this package needs of its metadata
# is written into OUT where it is not installed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
root=$PWD

say() { echo "[gpu_check] $*" >&2; }

case ${1-} in
    "" | -h | --help)
        echo "usage: scripts/gpu_check.sh OUT [options of scripts/gpu_check.py]"
        exec "${PYTHON:-python3}" scripts/gpu_check.py --help
        ;;
    -*)
        echo "usage: scripts/gpu_check.sh OUT [options]: OUT comes first, got $1" >&2
        exit 2
        ;;
esac
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd) || exit 1
shift

has_sglang() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("sglang") is None)' 2>/dev/null; }
python=
for candidate in ${PYTHON:+"$PYTHON"} python3 "$root/.venv/bin/python"; do
    if has_sglang "$candidate"; then
        python=$candidate
        break
    fi
    [[ $candidate == "${PYTHON:-}" ]] && break # a chosen one is not silently replaced
done
if [[ -z $python ]]; then
    say "ERROR: no Python with SGLang found (tried ${PYTHON:-python3 and .venv/bin/python})."
    say "       pip install -e '.[gpu]', or name one: PYTHON=/path/to/python $0 $out"
    exit 1
fi

missing=$("$python" - <<'EOF'
import importlib.util as u

needed = "torch transformers tokenizers numpy xxhash rapidfuzz httpx tqdm".split()
print(*(name for name in needed if u.find_spec(name) is None))
EOF
) || exit 1
if [[ -n $missing ]]; then
    say "ERROR: $python lacks: $missing"
    exit 1
fi

# SGLang finds the plug-in by its entry point, in whatever process it starts.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
has_plugin() {
    "$python" - <<'EOF'
import sys
from importlib import metadata

found = metadata.entry_points(group="sglang.srt.plugins")
sys.exit(not any(entry.name == "kvshare" for entry in found))
EOF
}
if ! has_plugin; then
    say "kvshare_sglang is not installed here: its metadata goes to $out/metadata"
    mkdir -p "$out/metadata"
    "$python" setup.py -q egg_info --egg-base "$out/metadata" >"$out/metadata.log" 2>&1
    export PYTHONPATH=$out/metadata:$PYTHONPATH
    if ! has_plugin; then
        say "ERROR: the entry point could not be written; see $out/metadata.log"
        exit 1
    fi
fi

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset KVSHARE_LAUNCHER KVSHARE_MEASURE_ALL_ROWS
say "$("$python" -V 2>&1) ($python); results in $out"
exec "$python" scripts/gpu_check.py "$out" "$@"
