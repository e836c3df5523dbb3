"""Pictures: answers against the share computed again, and streams against depth."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "full": "#222222", "copy": "#bbbbbb", "random": "#d0b8a8", "epic": "#7f9fbf",
    "cacheblend": "#e0a458", "attention": "#b58fc0", "deviation": "#c06c84",
    "window": "#6c9a8b", "dhd": "#2a7f62", "oracle": "#8a1c1c", "trace": "#1f5fd0",
    "trace+refresh": "#0b2f6b", "rerun": "#888888", "prophetkv": "#4bb6c4",
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
        ax.axhline(mine[0]["accuracy_full"], color=COLOURS["full"], lw=0.8, ls=":")
        for selector in dict.fromkeys(r["selector"] for r in mine):
            points = sorted(
                (r["recomputed_share"], r["accuracy"]) for r in mine if r["selector"] == selector
            )
            ours = selector.startswith("trace")
            ax.plot(*zip(*points, strict=True), "o-", ms=4 if ours else 3, lw=2 if ours else 1.2,
                    color=COLOURS[selector], label=selector, zorder=3 if ours else 2)  # fmt: skip
        ax.set_title(f"{task}, {case}", fontsize=9)
        ax.set_xlim(left=0)
        ax.grid(alpha=0.2)
    for ax in axes[-1]:
        ax.set_xlabel("share of reused rows computed again", fontsize=8)
    for line in axes:
        line[0].set_ylabel("accuracy", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=len(labels))
    save(figure, path)


def draw_streams(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the number of the request and against the depth of its sources; one line
    a bound on depth. Full prefill of the same requests is dotted."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), constrained_layout=True)
    for i, one in enumerate(rows):
        label = f"at most {one['source_depth']} ({one['reused_share']:.0%} of tokens reused)"
        for ax, at, points in ((left, "from", one["by_50"]), (right, "depth", one["by_depth"])):
            for key, style in (("accuracy_full", ":"), ("accuracy", "o-")):
                ax.plot([p[at] for p in points], [p[key] for p in points], style, ms=3, lw=1.2,
                        color=f"C{i}", label=label if key == "accuracy" else None)  # fmt: skip
    for point in rows[-1]["by_depth"]:
        right.annotate(str(point["n"]), (point["depth"], 0.52), fontsize=6, ha="center")
    left.set_xlabel("number of the request, by 50", fontsize=8)
    right.set_xlabel("depth of the sources (below: requests of the last line)", fontsize=8)
    left.set_ylabel("accuracy", fontsize=8)
    for ax in (left, right):
        ax.set_ylim(0.5, 1.02)
        ax.grid(alpha=0.2)
    left.legend(title="source depth", title_fontsize=7, fontsize=7, loc="lower left")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure, and give back what it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
