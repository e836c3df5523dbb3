#!/usr/bin/env bash
# Real requests at real arrival times to several server configurations; docs/load_tests.md.
#
#   scripts/load_test.sh --requests FILE --arrivals FILE [--server NAME=FLAGS ...] [...]
#
# --help lists the options. The first time it also sets up aiperf, the client, in .venv/aiperf
# (a minute, 1.2 GB); with --bench-serving the packages that SGLang's own tool needs.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_env.sh
env_setup

familiar=
for word in "$@"; do
    case $word in
        --bench-serving) familiar=1 ;;
        -h | --help) exec python -m kvshare_sglang.bench load --help ;;
    esac
done
if [[ -n $familiar ]]; then
    env_bench_serving
else
    env_aiperf
fi
exec python -m kvshare_sglang.bench load "$@"
