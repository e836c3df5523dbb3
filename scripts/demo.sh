#!/usr/bin/env bash
# Shows a real SGLang server with and without kvshare; --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_env.sh
env_setup
exec python -m kvshare_sglang.bench demo "$@"
