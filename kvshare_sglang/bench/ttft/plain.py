"""The plain server's own best setting: chunk and threads, found by trying."""

from typing import Any

import numpy as np

from kvshare_sglang.bench import common
from kvshare_sglang.bench.server import serve
from kvshare_sglang.bench.ttft.arms import Bench, Setting, server_spec
from kvshare_sglang.bench.ttft.cases import random_tokens

CHUNKS = (512, 2048, 8192)


def probe_plain(bench: Bench) -> tuple[dict[int, Setting], list[dict[str, Any]]]:
    """The fastest setting of the plain server for each size, and all that was tried.

    Threads first, at the largest chunk and all sizes; then the chunk, for each size.
    """
    args = bench.args
    chunks = [args.plain_chunk] if args.plain_chunk else list(CHUNKS)
    counts = sorted({1, bench.ours.threads}) if args.device == "cpu" else [bench.ours.threads]
    if args.plain_threads:
        counts = [args.plain_threads]
    if len(chunks) == len(counts) == 1:
        return dict.fromkeys(args.sizes, Setting(chunks[0], counts[0])), []
    found = {(max(chunks), n): _probe(bench, Setting(max(chunks), n)) for n in counts}
    threads = min(counts, key=lambda n: sum(found[max(chunks), n].values()))
    for chunk in chunks:
        if (chunk, threads) not in found:
            found[chunk, threads] = _probe(bench, Setting(chunk, threads))
    best = {
        size: Setting(min(chunks, key=lambda chunk: found[chunk, threads][size]), threads)
        for size in args.sizes
    }
    tried = [
        {"chunk": chunk, "threads": n, "ttft_p50_s": times} for (chunk, n), times in found.items()
    ]
    return best, tried


def _probe(bench: Bench, setting: Setting) -> dict[int, float]:
    """Median TTFT of plain by size."""
    rng = np.random.default_rng(1)
    vocab = bench.vocab
    print(f"probe: plain with chunks of {setting.chunk}, {setting.threads} threads", flush=True)
    with serve(server_spec(bench, "plain", setting)) as (server,):
        server.ask(random_tokens(rng, 256, vocab).tolist())
        return {
            size: common.median(
                [server.ask(random_tokens(rng, size, vocab).tolist()).ttft_s for _ in range(2)]
            )
            for size in bench.args.sizes
        }
