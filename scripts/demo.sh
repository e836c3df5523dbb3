#!/usr/bin/env bash
# Shows a real SGLang server with and without kvshare; options are those of demo.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_env.sh
env_setup
exec python scripts/demo.py "$@"
