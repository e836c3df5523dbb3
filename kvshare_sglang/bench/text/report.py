"""What the lines of ``text`` and ``why`` come to: right answers, flips, KL and shares, by arm."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from kvshare_sglang.bench import common

MEANS = (
    "f1", "kl", "kl_most", "margin", "nll", "top1", "top1_sure", "same", "rouge_l",
    "recomputed", "computed", "refreshed", "share", "first", "doubted",
)  # fmt: skip
DOUBTS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 1.2)  # nats
CLEAR = 0.5  # nats: a margin of full prefill that is no toss
OURS, NOTHING = "trace", "copies"
OF_WORDS = ("qa1", "qa2", "qa3")  # tasks whose answers are judged word by word too, by F1
NEEDED = {"kl", "computed"}  # to compare at the same FLOPs


def split(name: str) -> tuple[str, float | None]:
    """An arm's selector, and the budget that its name tells.

    >>> split("trace refresh 0.3"), split("copies")
    (('trace refresh', 0.3), ('copies', None))
    """
    selector, _, budget = name.rpartition(" ")
    try:
        return selector, float(budget)
    except ValueError:
        return name, None


def summary(folder: Path) -> list[dict[str, Any]]:
    """A row for each task, case and arm. Intervals are bootstrapped over prompts, and those of
    differences over pairs."""
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        task, _, case = file.stem.partition("-")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        if task not in OF_WORDS:
            for one in (one for line in lines for one in line["arms"].values()):
                one.pop("f1", None)
        names = list(dict.fromkeys(name for line in lines for name in line["arms"]))
        rows += [_row(lines, name, task=task, case=case) for name in names]
    return rows


def same_flops(folder: Path) -> list[dict[str, Any]]:
    """KL of ours over that of each other selector *at the FLOPs that ours takes*, where a run has
    them at several budgets. Between two of its budgets a selector's log KL is taken as a straight
    line over FLOPs, from copies on; beyond its largest budget it is not told. Intervals are
    bootstrapped over prompts, all arms of a prompt together."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        task, _, case = file.stem.partition("-")
        lines = [json.loads(line)["arms"] for line in file.read_text().splitlines()]
        names = [n for n in (lines or [{}])[0] if all(x.get(n, {}).keys() >= NEEDED for x in lines)]
        if NOTHING not in names:
            continue
        kl = {name: np.array([line[name]["kl"] for line in lines]) for name in names}
        flops = {name: _mean([line[name]["computed"] for line in lines]) for name in names}
        curves: dict[str, list[str]] = {}
        for name in sorted(names, key=flops.__getitem__):
            curves.setdefault(split(name)[0], [NOTHING]).append(name)
        rivals = {k: v for k, v in curves.items() if k not in (OURS, NOTHING) and len(v) > 2}
        for mine in curves.get(OURS, [NOTHING])[1:]:
            for rival, points in rivals.items():
                x, theirs = [flops[p] for p in points], [kl[p] for p in points]
                if x[0] <= flops[mine] <= x[-1]:
                    ratio = _ratio(kl[mine], theirs, x, flops[mine])
                    ci95 = _ratio_ci95(kl[mine], theirs, x, flops[mine])
                    found.append({
                        "task": task, "case": case, "arm": mine, "n": len(lines), "rival": rival,
                        "computed": flops[mine], "kl": _mean(kl[mine]), "ratio": ratio,
                        "ratio_ci95": ci95,
                    })  # fmt: skip
    return found


def _ratio(mine: np.ndarray, theirs: list[np.ndarray], x: list[float], at: float) -> float:
    curve = np.log([np.maximum(kl.mean(), 1e-12) for kl in theirs])
    return float(mine.mean() / np.exp(np.interp(at, x, curve)))


def _ratio_ci95(
    mine: np.ndarray, theirs: list[np.ndarray], x: list[float], at: float, *, rounds: int = 2000
) -> list[float]:
    picks = np.random.default_rng(0).integers(len(mine), size=(rounds, len(mine)))
    ratios = [_ratio(mine[pick], [kl[pick] for kl in theirs], x, at) for pick in picks]
    return [float(q) for q in np.quantile(ratios, (0.025, 0.975))]


def flips(folder: Path, *, bins: int = 6) -> list[dict[str, Any]]:
    """Right answers that became wrong or wrong ones right, by KL from full prefill, over all arms
    and prompts. A disturbance of the logits is of the order of KL's square root, and an answer
    flips where its margin is smaller; arms share prompts, so bins are not independent."""
    seen = [
        (one["kl"], one.get("right") != line["arms"]["full"].get("right"))
        for file in sorted(folder.glob("*.jsonl"))
        for line in map(json.loads, file.read_text().splitlines())
        for name, one in line["arms"].items()
        if name != "full" and "kl" in one and "right" in one
    ]
    parts = np.array_split(np.array(sorted(seen), float), bins) if len(seen) >= bins else []
    return [
        {
            "n": len(part),
            "kl": _mean(part[:, 0]),
            "flips": _mean(part[:, 1]),
            "flips_by_root": float(part[:, 1].mean() / np.sqrt(part[:, 0].mean())),
        }
        for part in parts
    ]


def doubts(folder: Path) -> list[dict[str, Any]]:
    """What ``--kvshare-doubt`` would do, from answers of the real server without it: a token whose
    margin is smaller makes the answer full prefill's, unless it had parted from that before."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        task, _, case = file.stem.partition("-")
        lines = [json.loads(line)["arms"] for line in file.read_text().splitlines()]
        pairs = [(one["full"], one["ours"]) for one in lines if "margins" in one.get("ours", {})]
        if not pairs or any(mine["doubted"] for _, mine in pairs):
            continue
        for doubt in (0.0, *DOUBTS):
            settled = [_settled_at(mine, doubt) for _, mine in pairs]
            right = np.array([full["right"] for full, _ in pairs], bool)
            got = np.array([
                full["right"] if _in_time(mine, at) else mine["right"]
                for (full, mine), at in zip(pairs, settled, strict=True)
            ], bool)  # fmt: skip
            same = [mine["same"] or _in_time(mine, at)
                    for (_, mine), at in zip(pairs, settled, strict=True)]  # fmt: skip
            found.append({
                "task": task, "case": case, "n": len(pairs), "doubt": doubt,
                "settled": _mean([at is not None for at in settled]),
                "at_first": _mean([at == 0 for at in settled]),
                "right": _mean(got), "lost": int((right & ~got).sum()),
                "won": int((~right & got).sum()), "same": _mean(same),
            })  # fmt: skip
    return found


def _settled_at(mine: dict[str, Any], doubt: float) -> int | None:
    return next((i for i, margin in enumerate(mine["margins"]) if margin < doubt), None)


def _in_time(mine: dict[str, Any], at: int | None) -> bool:
    """Whether an answer that is settled at a token had not parted from full prefill's before."""
    return at is not None and (mine["apart_at"] is None or at <= mine["apart_at"])


def show_doubts(rows: list[dict[str, Any]]) -> str:
    return common.columns(
        rows, cell="{task} {case}", n="{n}", doubt="{doubt:g}", settled="{settled:.0%}",
        at_the_first="{at_first:.0%}", right="{right:.3f}", lost="{lost}", won="{won}",
        same="{same:.0%}",
    )  # fmt: skip


def _row(lines: list[dict[str, Any]], name: str, **cell: str) -> dict[str, Any]:
    lines = [line for line in lines if name in line["arms"]]
    mine = [line["arms"][name] for line in lines]
    row: dict[str, Any] = {
        **cell,
        "arm": name,
        "n": len(mine),
        "tokens": _mean([line["tokens"] for line in lines]),
        "reusing": _mean([line.get("copied", 1) > 0 for line in lines]),  # share of the prompts
        **dict.fromkeys(("right", "right_ci95", "lost", "won")),  # where nobody knows the answer
    }
    if all("right" in one for one in mine):
        full = np.array([line["arms"]["full"]["right"] for line in lines], float)
        right = np.array([one["right"] for one in mine], float)
        row["right"], row["right_ci95"] = float(right.mean()), _ci(right)
        row["lost"] = int(((full == 1) & (right == 0)).sum())
        row["won"] = int(((full == 0) & (right == 1)).sum())
    for key in MEANS:
        values = [one[key] for one in mine if key in one]
        row[key] = _mean(values) if values else None
    for other in ("full", "copies"):  # prompt by prompt
        for key in ("right", "f1", "kl", "margin"):
            pairs = [(line["arms"][name], line["arms"].get(other, {})) for line in lines]
            apart = [a[key] - b[key] for a, b in pairs if key in a and key in b]
            row[f"{key}_minus_{other}"] = _mean(apart) if apart else None
            row[f"{key}_minus_{other}_ci95"] = _ci(np.array(apart, float)) if apart else None
    return row | _contest(lines, name)


def _contest(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """An answer that rivals contest is right by its margin, in nats: the deviation that an arm adds
    to that, and the right answers that it lost although full prefill's margin was ``CLEAR``."""
    pairs = [(line["arms"]["full"], line["arms"][name]) for line in lines]
    pairs = [(full, mine) for full, mine in pairs if "margin" in full and "margin" in mine]
    if len(pairs) < 2 or "right" not in pairs[0][0]:
        return {"noise": None, "lost_clear": None}
    noise = np.std([mine["margin"] - full["margin"] for full, mine in pairs], ddof=1)
    lost = [full["right"] and not mine["right"] and full["margin"] >= CLEAR for full, mine in pairs]
    return {"noise": float(noise), "lost_clear": sum(map(bool, lost))}


def _mean(values: Any) -> float:
    return float(np.mean(values))


def _ci(values: np.ndarray) -> list[float]:
    return common.bootstrap_ci95(list(values), statistic=np.mean)


def show(rows: list[dict[str, Any]]) -> str:
    def text(row: dict[str, Any]) -> dict[str, Any]:
        ci = row["right_minus_full_ci95"]
        shown = (*MEANS, "right", "right_minus_full", "noise")  # full prefill's are not measured
        blank = {key: np.nan for key in shown if row[key] is None}
        return {**row, **blank, "ci": "{:+.2f} {:+.2f}".format(*ci) if ci else "-"}

    return common.columns(
        [text(row) for row in rows],
        cell="{task} {case}",
        arm="{arm}",
        n="{n}",
        tokens="{tokens:.0f}",
        reusing="{reusing:.0%}",
        right="{right:.3f}",
        minus_full="{right_minus_full:+.3f}",
        ci95="{ci}",
        lost="{lost}",
        won="{won}",
        F1="{f1:.3f}",
        KL="{kl:.4f}",
        most="{kl_most:.3f}",
        lost_clear="{lost_clear}",
        margin="{margin:.2f}",
        noise="{noise:.2f}",
        nll="{nll:.3f}",
        top1="{top1:.3f}",
        sure="{top1_sure:.3f}",
        same="{same:.2f}",
        rouge_l="{rouge_l:.3f}",
        recomputed="{recomputed:.1%}",
        computed="{computed:.1%}",
    )


def show_level(rows: list[dict[str, Any]]) -> str:
    """The table of ``same_flops``."""
    return common.columns(
        [{**row, "ci": "{:.2f} {:.2f}".format(*row["ratio_ci95"])} for row in rows],
        cell="{task} {case}",
        arm="{arm}",
        n="{n}",
        computed="{computed:.1%}",
        KL="{kl:.4f}",
        against="{rival}",
        KL_over_theirs_at_the_same_FLOPs="{ratio:.2f}",
        ci95="{ci}",
    )
