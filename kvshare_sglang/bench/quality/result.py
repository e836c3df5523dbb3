"""A result as read back: rows under today's names and in order, and which of them are compared."""

from pathlib import Path
from typing import Any

from kvshare_sglang.bench import common, tasks
from kvshare_sglang.bench.quality.cases import CASES
from kvshare_sglang.config import KVShareConfig

Row = dict[str, Any]
Cells = dict[tuple[str, str], dict[str, Row]]  # by task and case, then by selector

OURS = "trace"
RENAMED = {"edit-window": "window"}  # in results of before 0.2


def load(path: Path) -> dict[str, Any]:
    """A result that ``--json`` wrote. Raises ScriptError where it is none."""
    result = common.read_result(path, "rows", "env")
    rows = [{**r, "selector": RENAMED.get(r["selector"], r["selector"])} for r in result["rows"]]
    order = [*tasks.TASKS, "text"]
    rows.sort(key=lambda r: (order.index(r["task"]), CASES.index(r["case"])))
    return {**result, "rows": rows}


def compared(rows: list[Row]) -> Cells:
    """One row a selector: ours at the budget nearest to the default, each other at the one for
    which it computes about as many FLOPs as ours."""
    default = KVShareConfig().budget
    out: Cells = {}
    for cell in dict.fromkeys((r["task"], r["case"]) for r in rows):
        here = [r for r in rows if (r["task"], r["case"]) == cell]
        ours = [r for r in here if r["selector"] == OURS]
        if not ours:
            continue
        mine = min(ours, key=lambda r: abs(r["budget"] - default))
        near = sorted(here, key=lambda r: -abs(r["computed_share"] - mine["computed_share"]))
        out[cell] = {r["selector"]: r for r in near} | {OURS: mine}
    return out


def show(rows: list[Row]) -> str:
    """All rows, for a terminal."""
    return common.columns(
        [{**r, "ratio": r["perplexity"] / r["perplexity_full"]} for r in rows],
        task="{task}",
        case="{case}",
        selector="{selector}",
        budget="{budget:.2f}",
        n="{n}",
        accuracy="{accuracy:.3f}",
        full="{accuracy_full:.3f}",
        copy="{accuracy_copy:.3f}",
        top1="{top1:.3f}",
        KL="{kl:.4f}",
        recomputed="{recomputed_share:.1%}",
        computed="{computed_share:.1%}",
        declined="{declined:.1%}",
        perplexity="{ratio:.4f}",
    )
