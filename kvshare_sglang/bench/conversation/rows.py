"""Rows that each turn of a history computes, in a server with kvshare and in stock SGLang."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvshare_sglang.bench import common
from kvshare_sglang.bench.common import KINDS, Progress, ScriptError
from kvshare_sglang.bench.conversation.histories import ANSWER, History, prompt
from kvshare_sglang.bench.server import Answer, Server

# By case: what is bounded, by how much, and in which words.
TARGETS: dict[str, list[tuple[str, float, str]]] = {
    "repeat": [("most_over", 2, "at most 2 rows over stock")],
    "edits": [
        ("most_ratio", 1.25, "each later turn at most 1.25x"),
        ("sum_ratio", 1.0, "sum at most 1x"),
    ],
    "header": [
        ("sum_ratio", 0.25, "sum at most 0.25x"),
        ("late_over_early", 1.1, "flat: late turns at most 1.1x early ones"),
    ],
    "together": [
        ("sum_ratio", 1.0, "sum at most 1x"),
        ("late_over_early", 1.1, "flat: late turns at most 1.1x early ones"),
    ],
    "compaction": [("sum_ratio", 1.0, "sum at most 1x")],
    "file": [("sum_ratio", 1.0, "sum at most 1x")],
}

Row = dict[str, Any]


def counted(answer: Answer) -> dict[str, int]:
    """Prompt tokens of an answer by what was done with them. Raises ScriptError unless they add up
    to the prompt, and the exact ones are SGLang's own count."""
    told = answer.kvshare
    kinds = {kind: int(told.get(f"{kind}_tokens", 0)) for kind in KINDS}
    total, cached = answer.meta["prompt_tokens"], answer.meta["cached_tokens"]
    if sum(kinds.values()) != total or kinds["exact"] != cached:
        raise ScriptError(f"{kinds} do not add up to {total} tokens with {cached} cached")
    return kinds


def rows_of(answer: Answer, *, stock: bool) -> int:
    """Rows that ran for a prompt, but for passes that chose some of them."""
    if stock:
        return int(answer.meta["prompt_tokens"] - answer.meta["cached_tokens"])
    kinds = counted(answer)
    return kinds["recomputed"] + kinds["fresh"]


def passes_of(answer: Answer) -> int:
    """What the passes that chose rows cost, in rows through all layers."""
    return int(answer.kvshare.get("traced_tokens", 0))


def play(
    server: Server, histories: Sequence[History], *, own: bool, bar: Progress
) -> Iterator[list[Answer]]:
    """The answers to each turn of conversations that go on side by side, whose turns are asked all
    at once; ``own``: they go on with what this server answered."""
    server.flush()
    said: list[list[list[int]]] = [[] for _ in histories]
    steps = zip(*(zip(h.turns, h.answers, strict=True) for h in histories), strict=True)
    with ThreadPoolExecutor(len(histories)) as pool:
        for step in steps:
            prompts = [prompt(turn, so_far) for (turn, _), so_far in zip(step, said, strict=True)]
            new = ANSWER if own else 1
            many = list(pool.map(lambda ids: server.ask(ids, max_new_tokens=new), prompts))  # noqa: B023
            for (_, written), so_far, got in zip(step, said, many, strict=True):
                so_far.append(got.output_ids if own else written)
            bar.update()
            yield many


def measure(
    stock: Server, ours: Server, histories: Sequence[History], *, own: bool, bar: Progress
) -> list[Row]:
    """A row for each turn, the sum of all that go on side by side."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(lambda it=it: list(play(it, histories, own=own, bar=bar)))  # type: ignore[misc]
            for it in (stock, ours)
        ]
        plain, shared = (job.result() for job in jobs)
    turns = histories[0].turns
    return [
        {
            "tokens": sum(one.meta["prompt_tokens"] for one in got),
            "counted": turn.counted,
            "stock": sum(rows_of(one, stock=True) for one in alone),
            "ours": sum(rows_of(one, stock=False) for one in got),
            "passes": sum(passes_of(one) for one in got),
            **_sums([counted(one) for one in got]),
            "declined": _words(one.kvshare["declined"] for one in got),
            "select": _words(one.kvshare["select"] for one in got),
        }
        for turn, alone, got in zip(turns, plain, shared, strict=True)
    ]


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {kind: sum(one[kind] for one in counts) for kind in KINDS}


def _words(found: Iterable[str | None]) -> str | None:
    """Which there are, None if none."""
    return ", ".join(sorted({one for one in found if one})) or None


def summary(history: History, rows: Sequence[Row]) -> dict[str, Any]:
    """What the turns of a history come to, and whether its targets are met."""
    judged = [row for row in rows if row["counted"]]
    worst = max(judged, key=lambda r: r["ours"] / r["stock"])
    work = [r["ours"] + r.get("passes", 0) for r in rows]
    most_work = max(w / r["stock"] for w, r in zip(work, rows, strict=True) if r["counted"])
    quarter = max(1, len(judged) // 4)
    early, late = (sum(r["ours"] for r in part) for part in (judged[:quarter], judged[-quarter:]))
    row = {
        "name": history.name,
        "case": history.case,
        "turns": len(rows),
        "stock": sum(r["stock"] for r in rows),
        "ours": sum(r["ours"] for r in rows),
        "sum_ratio": sum(r["ours"] for r in rows) / sum(r["stock"] for r in rows),
        "work_ratio": sum(work) / sum(r["stock"] for r in rows),
        "most_work": most_work,
        "most_ratio": worst["ours"] / worst["stock"],
        "most_over": max(r["ours"] - r["stock"] for r in judged),
        "ours_p50": common.median([r["ours"] for r in judged]),
        "late_over_early": late / max(1, early),
    }
    targets = TARGETS[history.case]
    return {
        **row,
        "target": "; ".join(words for _, _, words in targets),
        "met": all(row[name] <= most for name, most, _ in targets),
    }


def told(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the table; of some earlier results nothing is known of passes."""
    return [
        {**one, "work": f"{one['work_ratio']:.2f}x, {one['most_work']:.2f}x"}
        if "work_ratio" in one else {**one, "work": "-"}
        for one in summaries
    ]  # fmt: skip


COLUMNS = {
    "history": "{name}",
    "turns": "{turns}",
    "stock_rows": "{stock}",
    "our_rows": "{ours}",
    "sum": "{sum_ratio:.2f}x",
    "worst_turn": "{most_ratio:.2f}x",
    "rows_over": "{most_over:+d}",
    "late_/_early": "{late_over_early:.2f}",
    "sum_and_worst_turn_with_passes": "{work}",
    "target": "{target}",
    "met": "{met}",
}
