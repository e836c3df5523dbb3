"""The figures of a load test: of each run, over repeats, against the first configuration. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvshare_sglang.bench import common
from kvshare_sglang.bench.common import KINDS
from kvshare_sglang.bench.load.outcomes import Outcome

# Figures that are compared with the first configuration: more is better for the last two.
COMPARED = ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "longest_wait_s", "requests_per_s",
            "tokens_per_s")  # fmt: skip


def figures(run: Sequence[Outcome]) -> dict[str, Any]:
    """Of one run. Times to the first token are counted from when a request was due.

    ``tokens_per_s`` counts prompt and answer; rates are over the time from the first request to
    the last answer; ``behind_s`` is how long after the last request that was: a server that keeps
    up is behind by about one request. ``settled``: share of the requests that came to a token in
    doubt; ``settled_share``: rows that ran for these, as a share of all prompt tokens. Raises
    ZeroDivisionError for a run in which all failed.
    """
    good = [one for one in run if one.ok]
    waits = np.array([one.ttft_s for one in good])
    ended = max(one.due_s + one.total_s for one in good)
    first, last = min(one.due_s for one in run), max(one.due_s for one in run)
    kinds = {kind: sum(one.tokens[kind] for one in good) for kind in KINDS}
    prompt = sum(kinds.values())
    answered = sum(one.new_tokens for one in good)
    return {
        "requests": len(run),
        "failed": len(run) - len(good),
        "ttft_mean_s": float(waits.mean()),
        "ttft_p50_s": float(np.quantile(waits, 0.5)),
        "ttft_p99_s": float(np.quantile(waits, 0.99)),
        "longest_wait_s": float(waits.max()),
        "total_mean_s": float(np.mean([one.total_s for one in good])),
        "requests_per_s": len(good) / (ended - first),
        "tokens_per_s": (prompt + answered) / (ended - first),
        "behind_s": ended - last,
        "late_p99_s": float(np.quantile([one.late_s for one in run], 0.99)),
        "prompt_tokens": prompt,
        "settled": float(np.mean([one.settled > 0 for one in good])),
        "settled_share": sum(one.settled for one in good) / prompt,
        "shares": {kind: count / prompt for kind, count in kinds.items()},
    }


def over_repeats(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """``runs[i][k]``: figures of configuration ``i`` in repeat ``k``. For each configuration the
    mean of each figure, and its ratio to the first one's of the *same repeat*: mean and range."""
    out = []
    for its in runs:
        shares = {kind: _mean([one["shares"][kind] for one in its]) for kind in KINDS}
        numbers = [name for name in its[0] if name != "shares"]
        mean = {name: _mean([one[name] for one in its]) for name in numbers}
        ratios = {
            name: [one[name] / base[name] for one, base in zip(its, runs[0], strict=True)]
            for name in COMPARED
        }
        told = {n: {"mean": _mean(r), "least": min(r), "most": max(r)} for n, r in ratios.items()}
        out.append({**mean, "shares": shares, "ratios": told})
    return out


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def waiting_over_time(run: Sequence[Outcome]) -> tuple[list[float], list[int]]:
    """When the number of requests that are due and have no token yet changes, and to what."""
    changes = sorted(
        change for one in run if one.ok for change in ((one.due_s, 1), (one.due_s + one.ttft_s, -1))
    )
    times, counts, count = [], [], 0
    for at, step in changes:
        count += step
        times.append(at)
        counts.append(count)
    return times, counts


def shares_over_time(
    run: Sequence[Outcome], *, bins: int = 20
) -> tuple[list[float], dict[str, list[float]]]:
    """Middles of ``bins`` equal spans of the trace that had requests, and for each kind of prompt
    token its share among those of the requests that were due then."""
    good = [one for one in run if one.ok]
    stop = max(one.due_s for one in good) or 1.0
    spans: dict[int, list[Outcome]] = {}
    for one in good:
        spans.setdefault(min(int(one.due_s / stop * bins), bins - 1), []).append(one)
    middles = [(at + 0.5) * stop / bins for at in sorted(spans)]
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for at in sorted(spans):
        counts = {kind: sum(one.tokens[kind] for one in spans[at]) for kind in KINDS}
        for kind in KINDS:
            shares[kind].append(counts[kind] / sum(counts.values()))
    return middles, shares


def by_tenant(run: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """For each tenant that is named: requests, mean, p99 and longest time to the first token, and
    the share of its tokens that were in the cache in any way."""
    names = sorted({one.tenant for one in run if one.tenant is not None})
    out = {}
    for name in names:
        its = [one for one in run if one.tenant == name and one.ok]
        if its:
            told = figures(its)
            kept = 1 - told["shares"]["fresh"]
            wanted = ("requests", "ttft_mean_s", "ttft_p99_s", "longest_wait_s")
            out[name] = {**{part: told[part] for part in wanted}, "found": kept}
    return out


def show(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Two tables: the figures, and each time the first configuration's."""

    def times(row: dict[str, Any], name: str) -> str:
        ratio = row["ratios"][name]
        return f"{ratio['mean']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"

    plain = [
        [
            name,
            *(f"{row[part]:.3f}" for part in COMPARED[:4]),
            f"{row['requests_per_s']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['behind_s']:.1f}",
            f"{row['failed']:g}",
            *(f"{row['shares'][kind]:.1%}" for kind in KINDS),
            f"{row['settled_share']:.1%}",
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    head = ["seconds to the first token", "mean", "p50", "p99", "longest", "requests/s",
            "tokens/s", "behind s", "failed", *KINDS, "settled"]  # fmt: skip
    # A failed request is in no time: a configuration must not look fast by what it lost.
    ratios = [
        [
            name,
            *(times(row, part) for part in COMPARED),
            f"{row['failed']:g} of {row['requests']:g}",
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    second = [f"times {names[0]}'s", "mean", "p50", "p99", "longest", "requests/s", "tokens/s",
              "failed"]  # fmt: skip
    return f"{common.table(head, plain)}\n\n{common.table(second, ratios)}"
