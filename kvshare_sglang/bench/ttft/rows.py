"""What a run says: rows of ratios, each of one prompt in two arms, and tables of them."""

from collections.abc import Sequence
from typing import Any

from kvshare_sglang.bench import common
from kvshare_sglang.bench.tables import markdown
from kvshare_sglang.bench.ttft.arms import Sample


def summary(arm: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """One row of the JSON: an arm that reuses, against those that do not. Ratios are paired."""
    work = [sample.work[arm] for sample in samples]
    row: dict[str, Any] = {
        "arm": arm,
        "prompt_tokens": round(common.median([s.prompt_tokens for s in samples])),
        "ttft_p50_s": common.median([s.ttft_s[arm] for s in samples]),
    }
    for other in (name for name in samples[0].ttft_s if name in ("plain", "allrows")):
        ratios = common.spread([s.ttft_s[other] / s.ttft_s[arm] for s in samples])
        row[f"ttft_{other}_p50_s"] = common.median([s.ttft_s[other] for s in samples])
        row[f"ratio_{other}"] = ratios.p50
        row["iqr"] = ratios.iqr  # of the last, which is allrows where it runs
    computed = common.median([w.computed_share for w in work])
    return row | {
        "computed_share": computed,
        "recomputed_share": common.median([w.recomputed_share for w in work]),
        "merged_tokens": round(common.median([w.merged_tokens for w in work])),
        "ceiling": 1 / computed,
    }


def rows_of_result(samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    return [
        {"prompts": name, **summary(arm, group)}
        for name, group in samples.items()
        if group
        for arm in group[0].work
    ]


def show(result: dict[str, Any]) -> str:
    head = ("prompts", "arm", "ttft", "plain", "all rows", "vs plain", "vs all rows", "iqr",
            "ceiling", "computed", "recomputed")  # fmt: skip
    rows = [
        (
            row["prompts"],
            row["arm"],
            f"{row['ttft_p50_s']:.3f} s",
            _told(row.get("ttft_plain_p50_s"), "{:.3f} s"),
            _told(row.get("ttft_allrows_p50_s"), "{:.3f} s"),
            _told(row.get("ratio_plain"), "{:.2f}x"),
            _told(row.get("ratio_allrows"), "{:.2f}x"),
            _told(row.get("iqr"), "{:.2f}"),
            f"{row['ceiling']:.2f}x",
            f"{row['computed_share']:.1%}",
            f"{row['recomputed_share']:.1%}",
        )
        for row in result["rows"]
    ]
    miss = result["miss"]
    text = f"\n{common.table(head, rows)}\n\n"
    text += f"nothing to reuse: lookup {miss['lookup_ms_p50_8k']:.3f} ms at 8k tokens"
    if miss["ttft_ratio_p50"] is not None:
        low, high = miss["ci95"]
        text += f", TTFT x{miss['ttft_ratio_p50']:.4f} (95%: {low:.4f} to {high:.4f})"
    if result.get("tpot"):
        parts = (f"{row['arm']} {row['tpot_p50_ms']:.2f} ms" for row in result["tpot"])
        text += f"\ntime per output token: {', '.join(parts)}"
    return text


def of_one_arm(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is written today; the oldest results know only one arm, and do not name it."""
    if "arm" in row:
        return row
    ours = {"prompts": str(row["prompt_tokens"]), "arm": "kvshare"}
    return {**ours, "ttft_p50_s": row["ttft_kvshare_p50_s"], **row}


def speed_table(result: dict[str, Any]) -> list[str]:
    """The table of the README, and the line that says what it was measured on."""
    env, rows = result["env"], result["rows"]
    machine = env["gpu"] if env["device"] != "cpu" else f"{env['cpu']}, {env['cores']} cores"
    weights = " with random weights" if env.get("random_weights", True) else ""
    head = ("prompt", "plain SGLang", "kvshare", "faster", "computed")
    cells = [
        (
            row["prompts"],
            f"{row['ttft_plain_p50_s']:.3g} s",
            f"{row['ttft_p50_s']:.3g} s",
            f"{row['ratio_plain']:.2f}x",
            f"{row['computed_share']:.0%}",
        )
        for row in rows
        if "ratio_plain" in row
    ]
    return [
        *markdown(head, cells),
        "",
        f"Time to the first token, median; {env['model']['name']}{weights} on {machine}, commit "
        f"{env['commit']}.",
    ]


def full_table(result: dict[str, Any]) -> list[str]:
    """Times, ratios, and what share of the ceiling is reached; the ceiling counts FLOPs alone."""
    head = ("prompt", "arm", "plain", "kvshare", "vs plain", "vs all rows", "ceiling", "reached")
    cells = []
    for row in result["rows"]:
        share = row["ratio_allrows"] / row["ceiling"] if "ratio_allrows" in row else None
        cells.append(
            (
                row["prompts"],
                row["arm"],
                _told(row.get("ttft_plain_p50_s"), "{:.3g} s"),
                f"{row['ttft_p50_s']:.3g} s",
                _told(row.get("ratio_plain"), "{:.2f}x"),
                _told(row.get("ratio_allrows"), "{:.2f}x"),
                f"{row['ceiling']:.2f}x",
                _told(share, "{:.0%}"),
            )
        )
    return markdown(head, cells)


def _told(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
