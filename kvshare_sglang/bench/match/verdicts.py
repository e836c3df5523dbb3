"""What was to be reached, and whether a result reaches it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

NAMED = ("rag_musique", "rag_qmsum", "fewshot_gsm8k", "ctx_longchat5", "agent_magagent_a")


class Verdict(NamedTuple):
    figure: str
    value: float
    target: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target


def verdicts(result: dict[str, Any]) -> Iterable[Verdict]:
    """The targets that this result can speak about."""
    files = result.get("files", {})

    def get(name: str, setting: str, matcher: str, figure: str = "useful_share") -> float | None:
        value = files.get(name, {}).get(setting, {}).get(matcher, {}).get(figure)
        return None if value is None else float(value)

    for name in NAMED:
        if (share := get(name, "unlimited", "kvshare", "share_of_ceiling")) is not None:
            yield Verdict(f"{name}: share of the ceiling", share, 0.995)
        ours = get(name, "unlimited", "kvshare")
        for other in ("winnow", "fixed-any-offset"):
            theirs = get(name, "unlimited", other)
            musique = name == "rag_musique"
            if ours is None or not theirs or (other != "winnow" and not musique):
                continue
            factor = 1.0 if not musique else 1.15 if other == "winnow" else 1.5
            yield Verdict(f"{name}: useful, times {other}'s", ours / theirs, factor)
    for setting in ("cap10", "cap30"):
        pairs = [(get(n, setting, "kvshare"), get(n, setting, "kvshare-lru")) for n in NAMED]
        if all(a is not None and b for a, b in pairs):
            ratio = np.mean([a for a, _ in pairs]) / np.mean([b for _, b in pairs])
            yield Verdict(f"{setting}: useful, times LRU's", float(ratio), 1.2)
    pairs = [(get(n, "depth1", "kvshare"), get(n, "unlimited", "kvshare")) for n in NAMED]
    if all(a is not None and b for a, b in pairs):
        ratio = np.mean([a for a, _ in pairs]) / np.mean([b for _, b in pairs])
        yield Verdict("depth 1: useful, of unlimited depth's", float(ratio), 0.9)
    claimed = get("chat_arena_hard", "unlimited", "kvshare", "beyond_share")
    if claimed is not None:
        yield Verdict("chat_arena_hard: claimed", claimed, 0.002, at_most=True)
    synthetic = result.get("synthetic", {}).get("twins", {})
    for edited, least in (("5%", 0.98), ("10%", 0.95), ("20%", 0.88)):
        if edited in synthetic:
            ours_row = synthetic[edited]["kvshare"]
            yield Verdict(f"twins {edited}: unedited found", ours_row["found"], least)
            yield Verdict(f"twins {edited}: runs per edit", ours_row["runs_per_edit"], 1.2, True)
    if "templates" in result.get("synthetic", {}):
        found = result["synthetic"]["templates"]["kvshare"]["found"]
        yield Verdict("templates: frame found", found, 0.95)
    scale = result.get("scale", {})
    if scale:
        for size, limit in (("8k", 2.0), ("32k", 10.0)):
            full = scale["full_match"][size]
            yield Verdict(f"full match {size}: p50 ms", full["ms_p50"], limit, True)
            tail = full["ms_p99"] / full["ms_p50"]
            yield Verdict(f"full match {size}: p99 over p50", tail, 3.0, True)
        for size, limit in (("8k", 0.7), ("100k", 8.0)):
            yield Verdict(
                f"nothing found {size}: p50 ms", scale["nothing"][size]["ms_p50"], limit, True
            )
        yield Verdict("insert per 8k: p50 ms", scale["insert_8k"]["ms_p50"], 1.0, True)
        yield Verdict("bytes per token, churned", scale["bytes_per_token"], 16.0, True)
        yield Verdict("lookup, times that at 100k", scale["lookup_ratio"], 1.5, True)
