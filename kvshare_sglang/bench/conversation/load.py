"""Answers and rows at each chunk size, alone and with others at once, mixed chunks on and off."""

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench.conversation.rows import counted
from kvshare_sglang.bench.quality.cases import Prompt
from kvshare_sglang.bench.server import Server

CHUNKS = (128, 256, 512, -1)
TOGETHER = (1, 8)
BATCH = 8  # prompts that share a cache, whether they are asked at once or not


class Load(NamedTuple):
    """How prompts meet a server. ``chunk``: -1 is a prompt whole."""

    server: str  # stock or ours
    chunk: int
    mixed: bool
    together: int  # prompts asked at once

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--enable-mixed-chunk",) if self.mixed else ()

    def __str__(self) -> str:
        chunk = "whole" if self.chunk < 0 else str(self.chunk)
        return f"{self.server}-{chunk}{'-mixed' if self.mixed else ''}-{self.together}"


def loads(chunks: Sequence[int], mixed: Sequence[bool], together: Sequence[int]) -> list[Load]:
    """Stock SGLang with whole prompts, one by one, then ours in every way; those of one server
    one after another."""
    every = itertools.product(chunks, mixed, together)
    return [Load("stock", -1, False, 1), *(Load("ours", *one) for one in every)]


def lines(server: Server, load: Load, prompts: list[Prompt]) -> list[dict[str, Any]]:
    """A line for each prompt of a batch."""
    stock = load.server == "stock"
    server.flush()
    with ThreadPoolExecutor(load.together) as pool:
        for one in prompts:
            for ids in one.cached:
                server.ask(ids.tolist(), kvshare=None if stock else "exact")

        def ask(one: Prompt) -> dict[str, Any]:
            got = server.ask(one.ids.tolist(), max_new_tokens=len(one.answer))
            told = {} if stock else {**counted(got), "select": got.kvshare["select"]}
            cached = got.meta["cached_tokens"]
            right = got.output_ids == one.answer.tolist()
            return {"right": right, "tokens": len(one.ids), "exact": cached, **told}

        return list(pool.map(ask, prompts))


def summary(
    found: list[dict[str, Any]], full: list[dict[str, Any]], load: Load, **cell: Any
) -> dict[str, Any]:
    """A row; ``full``: stock SGLang's lines on the same prompts, as far as there are any."""
    both = list(zip(found, full, strict=False))
    apart = [float(a["right"]) - float(b["right"]) for a, b in both]
    again = sum(one.get("recomputed", 0) for one in found)
    reused = again + sum(one.get("copied", 0) for one in found)
    computed = [
        one["recomputed"] + one["fresh"] if "fresh" in one else one["tokens"] - one["exact"]
        for one in found
    ]
    selectors = sorted({one["select"] for one in found if one.get("select")})
    return {
        **cell,
        **load._asdict(),
        "n": len(found),
        "right": float(np.mean([one["right"] for one in found])),
        "minus_full": float(np.mean(apart)) if apart else None,
        "lost": sum(x < 0 for x in apart),
        "won": sum(x > 0 for x in apart),
        "rows": float(np.mean(computed)),
        "recomputed": again / reused if reused else 0.0,
        "select": "+".join(selectors) or "-",
    }


COLUMNS = {
    "cell": "{task} {case}",
    "server": "{server}",
    "chunk": "{chunk}",
    "mixed": "{mixed}",
    "at_once": "{together}",
    "ways": "{ways}",
    "n": "{n}",
    "right": "{right:.3f}",
    "minus_full": "{minus_full}",
    "lost": "{lost}",
    "won": "{won}",
    "rows": "{rows}",
    "recomputed": "{recomputed}",
    "select": "{select}",
}
_SAME = ("task", "case", "server", "n", "right", "minus_full", "lost", "won", "select")


def told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a table: ways to be served that gave the same answers share one, which says how
    many they are. Numbers that stand for a word as that word."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row[name] for name in _SAME), []).append(row)
    return [
        {
            **some[0],
            "chunk": _each(("whole" if row["chunk"] < 0 else str(row["chunk"])) for row in some),
            "mixed": _each(("on" if row["mixed"] else "off") for row in some),
            "together": _each(str(row["together"]) for row in some),
            "ways": len(some),
            "minus_full": "-" if some[0]["minus_full"] is None else f"{some[0]['minus_full']:+.3f}",
            "rows": _range([f"{row['rows']:.0f}" for row in some]),
            "recomputed": _range([f"{row['recomputed']:.1%}" for row in some]),
        }
        for some in alike.values()
    ]


def _each(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _range(shown: list[str]) -> str:
    low, high = min(shown, key=_number), max(shown, key=_number)
    return low if low == high else f"{low} to {high}"


def _number(shown: str) -> float:
    return float(shown.rstrip("%"))
