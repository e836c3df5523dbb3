"""A page of plots from ``eval_quality``: quality against the share computed again."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

_COLOURS = {
    "full": "#222222", "copy": "#bbbbbb", "random": "#d0b8a8", "epic": "#7f9fbf",
    "cacheblend": "#e0a458", "attention": "#b58fc0", "deviation": "#c06c84",
    "edit-window": "#6c9a8b", "dhd": "#2a7f62", "oracle": "#8a1c1c", "trace": "#1f5fd0",
    "trace+refresh": "#0b2f6b", "rerun": "#888888",
}  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a task and case; one line a selector, over budgets."""
    panels = list(dict.fromkeys((r["task"], r["case"]) for r in rows))
    columns = min(5, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 2.7 * lines), squeeze=False, sharey=True,
        constrained_layout=True,
    )  # fmt: skip
    for ax, (task, case) in zip(axes.flat, panels, strict=False):
        mine = [r for r in rows if (r["task"], r["case"]) == (task, case)]
        ax.axhline(mine[0]["accuracy_full"], color=_COLOURS["full"], lw=0.8, ls=":")
        for selector in dict.fromkeys(r["selector"] for r in mine):
            points = sorted(
                (r["recomputed_share"], r["accuracy"]) for r in mine if r["selector"] == selector
            )
            ours = selector.startswith("trace")
            ax.plot(*zip(*points, strict=True), "o-", ms=4 if ours else 3, lw=2 if ours else 1.2,
                    color=_COLOURS[selector], label=selector, zorder=3 if ours else 2)  # fmt: skip
        ax.set_title(f"{task}, {case}", fontsize=9)
        ax.set_xlim(left=0)
        ax.grid(alpha=0.2)
    for ax in axes[-1]:
        ax.set_xlabel("share of reused rows computed again", fontsize=8)
    for line in axes:
        line[0].set_ylabel("accuracy", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=len(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
