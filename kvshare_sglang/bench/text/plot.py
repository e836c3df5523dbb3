"""Pictures: right answers and KL against the share of full prefill's FLOPs, a line a selector."""

from pathlib import Path
from typing import Any

from kvshare_sglang.bench.quality.plot import COLOURS, plt, save
from kvshare_sglang.bench.text.report import NOTHING, OURS, split

NAMES = {"copies": "copy", "deviation": "oracle"}  # here and there


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels a task and case, right answers above KL. Every line begins at copies alone, which
    compute nothing again; full prefill is dotted."""
    cells = list(dict.fromkeys((r["task"], r["case"]) for r in rows))
    figure, axes = plt.subplots(
        2, len(cells), figsize=(max(4.2, 3.6 * len(cells)), 5.6), squeeze=False, sharex=True,
        constrained_layout=True,
    )  # fmt: skip
    for (top, low), (task, case) in zip(axes.T, cells, strict=True):
        mine = [r for r in rows if (r["task"], r["case"]) == (task, case)]
        arms = [r for r in mine if r["computed"] is not None]
        start = [r for r in arms if r["arm"] == NOTHING]
        (full,) = (r for r in mine if r["arm"] == "full")
        if full["right"] is not None:
            top.axhline(full["right"], color=COLOURS["full"], lw=0.8, ls=":")
        for selector in dict.fromkeys(split(r["arm"])[0] for r in arms):
            points = [*start, *(r for r in arms if split(r["arm"])[0] == selector != NOTHING)]
            points.sort(key=lambda r: r["computed"])
            ours = selector == OURS
            style = {
                "ms": 4 if ours else 3, "lw": 2 if ours else 1.2, "zorder": 3 if ours else 2,
                "color": COLOURS.get(NAMES.get(selector, selector), "#9c9c54"), "label": selector,
            }  # fmt: skip
            x = [r["computed"] for r in points]
            for ax, key in ((top, "right"), (low, "kl")):
                if all(r[key] is not None for r in points):
                    ax.plot(x, [r[key] for r in points], "o-", **style)
        top.set_title(f"{task}, {case}, n = {full['n']}", fontsize=9)
        low.set_yscale("log")
        low.set_xlabel("share of full prefill's FLOPs", fontsize=8)
        for ax in (top, low):
            ax.set_xlim(left=0)
            ax.grid(alpha=0.2)
    axes[0][0].set_ylabel("right answers", fontsize=8)
    axes[1][0].set_ylabel("KL to full prefill", fontsize=8)
    (handles, labels), *_ = filter(all, (ax.get_legend_handles_labels() for ax in axes.flat))
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=4)
    save(figure, path)
