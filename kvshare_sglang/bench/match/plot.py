"""One page of plots from the result of the command match."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

_COLOURS = {
    "fixed-aligned": "#c7c7c7",
    "fixed-any-offset": "#7f9fbf",
    "winnow": "#e0a458",
    "kvshare": "#2a7f62",
    "ceiling": "#222222",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Useful share by file, useful share by chunk length, lookup time by prompt length."""
    figure, axes = plt.subplots(3, 1, figsize=(8.3, 11.7), constrained_layout=True)
    _bars(axes[0], result.get("files", {}))
    _curve(axes[1], result.get("curve", {}))
    _times(axes[2], result.get("files", {}), result.get("scale", {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(ax: Any, files: dict[str, Any]) -> None:
    names = [name for name, settings in files.items() if "unlimited" in settings]
    matchers = [
        m
        for m in _COLOURS
        if m != "ceiling" and all(m in files[name]["unlimited"] for name in names)
    ]
    width = 0.8 / max(len(matchers), 1)
    for i, matcher in enumerate(matchers):
        heights = [100 * files[name]["unlimited"][matcher]["useful_share"] for name in names]
        at = np.arange(len(names)) + (i - (len(matchers) - 1) / 2) * width
        ax.bar(at, heights, width, label=matcher, color=_COLOURS[matcher])
    for j, name in enumerate(names):
        rows = files[name]["unlimited"]
        if "ceiling" in rows:
            label = "ceiling: all that is there" if j == 0 else None
            ax.hlines(100 * rows["ceiling"]["beyond_share"], j - 0.42, j + 0.42,
                      color=_COLOURS["ceiling"], label=label)  # fmt: skip
            label = "of it, useful at most" if j == 0 else None
            ax.hlines(100 * rows["ceiling"]["useful_share"], j - 0.42, j + 0.42,
                      color=_COLOURS["ceiling"], linestyle=":", label=label)  # fmt: skip
    ax.set_xticks(range(len(names)), names, rotation=12)
    ax.set_ylabel("useful beyond the prefix,\n% of tokens")
    ax.set_title("What each matcher finds that is worth reusing (unlimited cache)")
    if names:
        ax.legend(fontsize=8)


def _curve(ax: Any, curve: dict[str, Any]) -> None:
    """One line a file over fixed lengths; the tree's own mean run length is the star."""
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    shown = [(name, rows) for name, rows in curve.items() if rows["kvshare"]["useful_share"] > 0.01]
    lengths: list[int] = []
    for colour, (name, rows) in zip(colours, shown, strict=False):
        lengths = sorted(int(key) for key in rows if key != "kvshare")
        heights = [100 * rows[str(n)]["useful_share"] for n in lengths]
        ax.plot(lengths, heights, "o-", color=colour, label=name, markersize=4)
        ours = rows["kvshare"]
        ax.axhline(100 * ours["useful_share"], color=colour, linestyle="--", linewidth=1)
        ax.plot([ours["run_len_mean"]], [100 * ours["useful_share"]], "*", color=colour,
                markersize=11)  # fmt: skip
    ax.set_xscale("log", base=2)
    if lengths:
        ax.set_xticks(lengths, [str(n) for n in lengths])
        ax.legend(fontsize=8)
    ax.set_xlabel("chunk length, tokens (star: mean run of kvshare)")
    ax.set_ylabel("useful beyond the prefix,\n% of tokens")
    ax.set_title("Fixed chunks at any offset (lines) and adaptive runs (dashed)")


def _times(ax: Any, files: dict[str, Any], scale: dict[str, Any]) -> None:
    """Median and 99th percentile of lookups, by prompt length, over all files."""
    points: dict[str, dict[float, list[list[float]]]] = {}
    for settings in files.values():
        for matcher, row in settings.get("unlimited", {}).items():
            for span, pair in (row.get("lookup_ms_by_len") or {}).items():
                lo, hi = (int(part) for part in span.split("-"))
                if matcher in _COLOURS and hi < 1 << 30:
                    points.setdefault(matcher, {}).setdefault((lo + hi) / 2, []).append(pair)
    for matcher, by_len in points.items():
        at = sorted(by_len)
        middle = [float(np.median([pair[0] for pair in by_len[n]])) for n in at]
        high = [max(pair[1] for pair in by_len[n]) for n in at]
        ax.plot(at, middle, "o-", color=_COLOURS[matcher], label=f"{matcher}, p50", markersize=4)
        if matcher == "kvshare":
            ax.plot(at, high, ":", color=_COLOURS[matcher], label="kvshare, p99 of the worst file")
    for group, mark, label in (
        ("full_match", "s", "full match"),
        ("nothing", "v", "nothing found"),
    ):
        rows = scale.get(group, {})
        if rows:
            at = [float(name.removesuffix("k")) * 1024 for name in rows]
            ax.plot(at, [row["ms_p50"] for row in rows.values()], mark, linestyle="-.",
                    color=_COLOURS["kvshare"], label=f"kvshare at 10M tokens, {label}")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("prompt, tokens")
    ax.set_ylabel("lookup, ms")
    ax.set_title("Lookup time")
    if points or scale:
        ax.legend(fontsize=7)
