"""Time to the first token of several samples of one prompt, against one sample of another."""

from typing import Any

from kvshare_sglang.bench import common
from kvshare_sglang.bench.common import Progress, ScriptError
from kvshare_sglang.bench.conversation.histories import DOCUMENT, Text, Tokens
from kvshare_sglang.bench.server import Server

SAMPLES = 4
MOST = 1.15  # times one sample's


def first_tokens(server: Server, ids: Tokens, n: int) -> list[float]:
    """Seconds until each of ``n`` samples has its first token, in order of time."""
    seen: dict[int, float] = {}
    for seconds, event in server.events(ids, max_new_tokens=4, n=n):
        if event["output_ids"]:
            seen.setdefault(int(event.get("index", 0)), seconds)
    if len(seen) != n:
        raise ScriptError(f"{server.spec.name} sent {len(seen)} samples of {n}")
    return sorted(seen.values())


def measure(
    servers: list[Server], text: Text, *, pairs: int, bar: Progress
) -> list[dict[str, Any]]:
    """A row for each server: ``n`` samples over one sample, both of prompts as long that hold a
    cached document in another place; pair by pair."""
    found: dict[str, list[tuple[float, float, float]]] = {
        server.spec.name: [] for server in servers
    }
    for pair in range(-1, pairs):  # the first is a warm-up
        documents = [text(DOCUMENT) for _ in range(2)]
        prompts = [text(40) + document + text(30) for document in documents]
        for server in servers:
            server.flush()
            for document in documents:
                server.ask(document)
            order = (1, SAMPLES) if pair % 2 else (SAMPLES, 1)
            times = {n: first_tokens(server, ids, n) for n, ids in zip(order, prompts, strict=True)}
            if pair >= 0:
                several = times[SAMPLES]
                found[server.spec.name].append((times[1][0], several[0], several[-1]))
            bar.update()
    return [_row(name, seconds) for name, seconds in found.items()]


def _row(name: str, seconds: list[tuple[float, float, float]]) -> dict[str, Any]:
    """``seconds``: of each pair, to one sample's first token, and to those of several samples."""
    first, last = (common.spread([pair[i] / pair[0] for pair in seconds]) for i in (1, 2))
    return {
        "server": name,
        "n": SAMPLES,
        "pairs": len(seconds),
        "one_s": common.median([pair[0] for pair in seconds]),
        "first": first._asdict(),
        "last": last._asdict(),
        "met": first.p50 <= MOST,
        "seconds": seconds,
    }


COLUMNS = {
    "server": "{server}",
    "samples": "{n}",
    "pairs": "{pairs}",
    "one_sample": "{one_s:.2f} s",
    "first_sample": "{first[p50]:.2f}x",
    "quartiles": "{first[q25]:.2f}-{first[q75]:.2f}",
    "last_sample": "{last[p50]:.2f}x",
    "met": "{met}",
}
