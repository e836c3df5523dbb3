"""Slots of the KV pool that a server holds over many turns: as many as stock, and all come back."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from kvshare_sglang.bench.common import Progress, ScriptError, metric
from kvshare_sglang.bench.conversation.histories import Text, Tokens
from kvshare_sglang.bench.server import Server

# With a line for each step, SGLang brings its gauges up to date as soon as it is idle.
FLAGS = ("--enable-metrics", "--decode-log-interval", "1")
_PROBE = [5, 6, 7, 8]
_IDLE_TIMEOUT_S = 60


class Step(NamedTuple):
    """One request; ``aborted`` ones are left off at their first token."""

    kind: str
    ids: Tokens
    n: int = 1
    aborted: bool = False


def steps(text: Text, rng: random.Random, num: int, *, users: int = 6) -> Iterator[Step]:
    """Turns of several conversations, mixed. Aborts come in the second half only: how much an
    aborted request leaves behind is a matter of time."""
    shared = [text(rng.randrange(120, 400)) for _ in range(8)]

    def begin() -> tuple[Tokens, Tokens]:
        return text(40) + shared[rng.randrange(len(shared))] + text(200), []

    open_ones = [begin() for _ in range(users)]
    last: list[Tokens] = []
    for i in range(num):
        at = rng.randrange(users)
        front, said = open_ones[at]
        kinds = ["turn"] * 11 + ["edit", "header", "again", "samples", "moved", "new"]
        kind = rng.choice(kinds + (["abort"] if i >= num // 2 else []))
        if kind == "new" or len(said) > 1500:
            front, said = begin()
        if kind == "edit":
            front = text(40) + front[40:]
        said = said + text(40)
        ids = front + said
        if kind == "header":
            ids = text(15) + ids
        elif kind == "moved":
            ids = [token for part in rng.sample(shared, 4) for token in part] + text(20)
        elif kind == "again" and last:
            ids = rng.choice(last)
        last = [*last, ids][-20:]
        open_ones[at] = front, said + text(40)
        yield Step(kind, ids, n=2 if kind == "samples" else 1, aborted=kind == "abort")


class Held(NamedTuple):
    """Slots of an idle server's pool, in tokens: cached, in use though nobody runs, free."""

    cached: int
    in_use: int
    free: int


def held(server: Server) -> Held:
    """What the pool of an idle server holds. Raises ScriptError if it does not become idle."""
    server.ask(_PROBE, max_new_tokens=4)
    deadline = time.monotonic() + _IDLE_TIMEOUT_S
    while time.monotonic() < deadline:
        page = server.client.get("/metrics").raise_for_status().text
        if _gauge(page, "num_running_reqs") == 0 and _gauge(page, "num_queue_reqs") == 0:
            names = ("kv_evictable_tokens", "num_used_tokens", "kv_available_tokens")
            return Held(*(_gauge(page, name) for name in names))
        time.sleep(0.2)
    raise ScriptError(f"{server.spec.name} is not idle after {_IDLE_TIMEOUT_S} s")


def _gauge(page: str, name: str) -> int:
    found = metric(page, f"sglang:{name}")
    if not found:
        raise ScriptError(f"the server's /metrics page has no sglang:{name}")
    return int(found[0][1])


def _ask(server: Server, step: Step) -> None:
    new = 64 if step.aborted else 2
    for _, event in server.events(step.ids, max_new_tokens=new, n=step.n):
        if step.aborted and event["output_ids"]:
            break


def measure(
    stock: Server, ours: Server, all_steps: list[Step], *, every: int, bar: Progress
) -> dict[str, Any]:
    """Both pools after each ``every`` steps, and after a flush at the end."""
    servers = (stock, ours)

    def both(part: list[Step]) -> list[Held]:
        def one(server: Server) -> Held:
            for step in part:
                _ask(server, step)
                bar.update()
            return held(server)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, servers))

    for server in servers:
        server.flush()
    before = both([])
    samples: list[dict[str, Any]] = []
    comparable = True
    for at in range(0, len(all_steps), every):
        part = all_steps[at : at + every]
        alone, shared = both(part)
        # An abort, or a pool of stock's that had to evict: from then on chance decides.
        comparable = (
            comparable
            and not any(step.aborted for step in part)
            and alone.free > before[0].free // 20
        )
        samples.append(
            {
                "steps": at + len(part),
                "stock": alone._asdict(),
                "ours": shared._asdict(),
                "comparable": comparable,
            }
        )
    for server in servers:
        server.flush()
    after = both([])
    more = [s["ours"]["cached"] - s["stock"]["cached"] for s in samples if s["comparable"]]
    return {
        "steps": len(all_steps),
        "samples": samples,
        "before": [one._asdict() for one in before],
        "after": [one._asdict() for one in after],
        "leaked": before[1].free - after[1].free,
        "most_in_use": max(s["ours"]["in_use"] for s in samples),
        "most_over_stock": max(more) if more else None,
        "met": after[1] == before[1]
        and all(s["ours"]["in_use"] == s["stock"]["in_use"] for s in samples)
        and max(more, default=0) <= 0,
    }


COLUMNS = {
    "after": "{after}",
    "stock_holds": "{stock[cached]}",
    "ours_holds": "{ours[cached]}",
    "over_stock": "{over}",
    "stock_in_use": "{stock[in_use]}",
    "ours_in_use": "{ours[in_use]}",
}


def told(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table: after some requests each, and after the flush."""

    def row(after: str, one: dict[str, Any], comparable: bool) -> dict[str, Any]:
        over = one["ours"]["cached"] - one["stock"]["cached"]
        return {**one, "after": after, "over": over if comparable else "-"}

    rows = [row(f"{s['steps']} requests", s, s["comparable"]) for s in result["samples"]]
    last = dict(zip(("stock", "ours"), result["after"], strict=True))
    return [*rows, row("a flush", last, True)]
