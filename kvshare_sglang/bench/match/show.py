"""A result as plain tables."""

from typing import Any

from kvshare_sglang.bench.common import table
from kvshare_sglang.bench.match import scale, spans, synthetic
from kvshare_sglang.bench.match.verdicts import verdicts
from kvshare_sglang.bench.tables import markdown

_FIGURES = ("prefix", "beyond", "useful", "saved", "of ceiling", "runs", "edits", "p50 ms",
            "p99 ms", "ins/8k", "B/tok", "distinct")  # fmt: skip


def show(result: dict[str, Any]) -> str:
    parts = []
    for name, settings in result.get("files", {}).items():
        for setting, rows in settings.items():
            parts.append(
                table((f"{name} {setting}", *_FIGURES), [_cells(m, r) for m, r in rows.items()])
            )
    for name, rows in result.get("curve", {}).items():
        cells = [
            (m, f"{r['beyond_share']:.1%}", f"{r['useful_share']:.1%}", _num(r["run_len_mean"], 0))
            for m, r in rows.items()
        ]
        parts.append(table((f"{name} chunks", "beyond", "useful", "run mean"), cells))
    if "synthetic" in result:
        parts.append(synthetic.show(result["synthetic"]))
    if "spans" in result:
        parts.append(spans.show(result["spans"]))
    if "scale" in result:
        parts.append(scale.show(result["scale"]))
    found = list(verdicts(result))
    if found:
        cells = [
            (v.figure, f"{v.value:.3f}", f"{'<=' if v.at_most else '>='} {v.target:g}",
             "ok" if v.reached else "MISSED")
            for v in found
        ]  # fmt: skip
        parts.append(table(("to reach", "here", "target", ""), cells))
    return "\n\n".join(parts)


def _cells(matcher: str, r: dict[str, Any]) -> tuple[str, ...]:
    of_ceiling = r["share_of_ceiling"]
    return (
        matcher,
        *(f"{r[k]:.2%}" for k in ("prefix_share", "beyond_share", "useful_share", "saved_share")),
        "" if of_ceiling is None else f"{of_ceiling:.2%}",
        *(f"{r[k]:.1f}" for k in ("runs_mean", "edits_mean")),
        *(_num(r[k], 2) for k in ("lookup_ms_p50", "lookup_ms_p99")),
        _num(r.get("insert_ms_per_8k"), 2),
        _num(r["bytes_per_token"], 1),
        "" if "distinct_share" not in r else f"{r['distinct_share']:.0%}",
    )


def _num(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def found_table(result: dict[str, Any]) -> list[str]:
    """By file, in a cache without limit: what is found of all there is, and what is useful."""
    matchers = ("kvshare", "winnow", "fixed-any-offset", "ceiling")
    head = ("file", "there", "found of it", "useful", *matchers[1:-1], "useful at most")
    cells = []
    for name, settings in result.get("files", {}).items():
        rows = settings.get("unlimited", {})
        if set(matchers) <= set(rows):
            of_all = rows["kvshare"]["share_of_ceiling"]
            there = f"{rows['ceiling']['beyond_share']:.1%}"
            shares = (f"{rows[matcher]['useful_share']:.1%}" for matcher in matchers)
            cells.append((name, there, "-" if of_all is None else f"{of_all:.1%}", *shares))
    return markdown(head, cells)
