#!/usr/bin/env bash
# Tries a newer SGLang beside the pinned one and says in one page what broke.
#
#   scripts/next_sglang.sh            the newest release that pip's index has
#   scripts/next_sglang.sh VERSION    this one, newer or older
#
# The page goes to the screen and to out/next-sglang-VERSION.md. Exit status: 0 when nothing
# broke (or there is nothing newer), 1 when something did, 2 for bad usage.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
. scripts/_env.sh

if (($# > 1)) || [[ ${1-} == -* ]]; then
    echo "usage: scripts/next_sglang.sh [VERSION]" >&2
    exit 2
fi
env_setup || exit 1
version=${1-}
if [[ -z $version ]]; then
    # The first line reads: sglang (0.5.23)
    version=$(python -m pip --disable-pip-version-check index versions sglang 2>/dev/null |
        sed -n '1s/^sglang (\(.*\))$/\1/p')
    [[ -n $version ]] || _env_die "pip's index names no version of sglang" \
        "Check the network, or name one: scripts/next_sglang.sh VERSION"
    if [[ $version == "$ENV_SGLANG" ]]; then
        echo "SGLang $version is the newest, and it is the one that is served."
        exit 0
    fi
fi
folder=$(env_other_sglang "$version") || exit 1
exec python -m kvshare_sglang.bench.next_sglang "$ENV_SGLANG" "$version" "$folder"
