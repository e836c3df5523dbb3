"""The demo's table as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvshare_sglang.bench.demo.scenarios import Scenario

BLUE, ORANGE, LIGHT, GREY = "#3b6ea5", "#e07b39", "#f2c49b", "#c9ced6"


Row = tuple[str, float, float, dict[str, float]]  # title, seconds plain and ours, shares by part
CPU_NOTE = "in brackets: the ratio of the servers' CPU times"


def draw(kinds: list[Scenario], path: Path, *, subtitle: str) -> None:
    """The table as a picture: times on the left, what became of the prompt on the right."""
    parts = ("prefix", "copied", "recomputed", "new")
    rows = [(k.title, k.plain_s, k.kvshare_s, {p: k.share(p) for p in parts}) for k in kinds]
    ratios = [(k.ratio, k.cpu_ratio) for k in kinds]
    draw_pairs(rows, path, subtitle=subtitle, ratios=ratios)


def draw_pairs(
    pairs: Sequence[Row], path: Path, *, subtitle: str, ratios: Sequence[tuple[float, float]]
) -> None:
    """``ratios``: of the times, and of processor times."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (times, parts) = plt.subplots(
        1, 2, figsize=(12, 4.6), sharey=True, gridspec_kw={"width_ratios": (1.25, 1)}
    )
    _draw_times(times, pairs, ratios)
    _draw_parts(parts, [shares for _, _, _, shares in pairs])
    figure.suptitle(
        "SGLang with and without kvshare", x=0.01, y=0.99, ha="left", fontsize=14, weight="bold"
    )
    figure.text(0.01, 0.905, f"{subtitle}; {CPU_NOTE}", ha="left", fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0, 1, 0.91), w_pad=2.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_times(axes: Any, pairs: Sequence[Row], ratios: Sequence[tuple[float, float]]) -> None:
    height = 0.36
    rows = range(len(pairs))
    sides = ([p for _, p, _, _ in pairs], [o for _, _, o, _ in pairs])
    for shift, times, colour, label in (
        (-height / 2, sides[0], GREY, "plain"),
        (height / 2, sides[1], BLUE, "kvshare"),
    ):
        axes.barh([y + shift for y in rows], times, height, color=colour, label=label)
    longest = max(map(max, sides))
    for y, (_, plain, ours, _), (ratio, cpu) in zip(rows, pairs, ratios, strict=True):
        axes.text(plain + longest * 0.012, y - height / 2, f"{plain:.2f} s",
                  va="center", fontsize=9, color="#666666")  # fmt: skip
        said = f"{ours:.2f} s   {ratio:.1f}x ({cpu:.1f}x)"
        axes.text(ours + longest * 0.012, y + height / 2, said,
                  va="center", fontsize=9, weight="bold", color=BLUE)  # fmt: skip
    axes.set_yticks(list(rows), [title for title, _, _, _ in pairs])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, longest * 1.2)
    axes.set_xlabel("seconds")
    axes.set_title("Time to first token (less is better)", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_parts(axes: Any, shares: Sequence[dict[str, float]]) -> None:
    looks = (
        ("prefix", "prefix", "#8fb08c", "white"),
        ("copied", "reused", BLUE, "white"),
        ("recomputed", "recomputed", ORANGE, "white"),
        ("new", "new text", LIGHT, "#6b4a2b"),
    )
    rows = range(len(shares))
    left = [0.0] * len(shares)
    for part, label, colour, ink in looks:
        widths = [100 * one[part] for one in shares]
        axes.barh(rows, widths, 0.5, left=left, color=colour, label=label)
        for y, start, width in zip(rows, left, widths, strict=True):
            if width >= 6:
                axes.text(start + width / 2, y, f"{width:.0f}%",
                          ha="center", va="center", fontsize=9, color=ink)  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("% of the prompt's tokens")
    axes.set_title("What kvshare did with the prompt", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
