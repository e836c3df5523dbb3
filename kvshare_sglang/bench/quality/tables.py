"""Tables of the docs about answers: which numbers of a result a page shows.

``TABLES`` holds what a page may ask for: ``<!-- NAME -->`` and ``<!-- /NAME -->`` around a table
are enough, and ``--table PAGE.md`` writes it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvshare_sglang.bench.quality.result import OURS, Row, compared
from kvshare_sglang.bench.tables import markdown, write_marked

RIVALS = ("epic", "cacheblend")
LABELS = {"epic": "EPIC", "cacheblend": "CacheBlend", "copy": "copies alone", "trace": "trace"}
# what of it the README tells: where answers turn on what the copied text meant
TOLD_TASKS = {"hops": "chains of facts", "state": "headers that change meanings"}
TOLD_CASES = {
    "splice": "in another order, among others",
    "edit far": "edited far from the question",
    "template": "same frame, other values",
    "adversarial": "computed after a misleading text",
}


def write_tables(page: Path, result: dict[str, Any]) -> None:
    """Write each table that the page has markers for and the result has numbers for."""
    made = {n: make(result[kind]) for n, (kind, make) in TABLES.items() if result.get(kind)}
    print(f"tables of {page.name}: {', '.join(write_marked(page, made))}")


def points(ci95: Sequence[float]) -> str:
    return f"{100 * ci95[0]:+.1f} to {100 * ci95[1]:+.1f} points"


def _share(found: dict[str, Row], name: str, form: str) -> str:
    return form.format(**found[name]) if name in found else "-"


def answers(rows: list[Row]) -> list[str]:
    """The table of the README."""
    told = {
        f"{task}: {case}": found
        for t, task in TOLD_TASKS.items()
        for c, case in TOLD_CASES.items()
        if (found := compared(rows).get((t, c)))
    }
    rivals = [LABELS[name] for name in RIVALS]
    lines = markdown(
        ("what was cached, what is asked", "full prefill", "kvshare", "points apart, 95%", *rivals,
         "copies alone"),
        [
            (
                label,
                _share(found, OURS, "{accuracy_full:.3f}"),
                _share(found, OURS, "**{accuracy:.3f}**"),
                points(found[OURS]["ci95"]).removesuffix(" points"),
                *(_share(found, name, "{accuracy:.3f}") for name in RIVALS),
                _share(found, OURS, "{accuracy_copy:.3f}"),
            )
            for label, found in told.items()
        ],
    )  # fmt: skip
    each = list(told.values())
    mine = [found[OURS] for found in each]
    again = [100 * r["recomputed_share"] for r in mine]
    counts = sorted({r["n"] for r in mine})
    spent = {
        label: [100 * found[name]["computed_share"] for found in each if name in found]
        for name, label in {OURS: "kvshare", **{name: LABELS[name] for name in RIVALS}}.items()
    }
    shares = ", ".join(f"{k} {min(v):.0f} to {max(v):.0f}%" for k, v in spent.items() if v)
    return [
        *lines,
        "",
        f"(accuracy, {' or '.join(map(str, counts))} prompts a row; {min(again):.0f} to"
        f" {max(again):.0f}% of the reused rows computed again, all counted; of full prefill's"
        f" FLOPs {shares})",
    ]


def by_case(rows: list[Row]) -> list[str]:
    """Accuracy in every task and case."""
    rivals = [LABELS[name] for name in RIVALS]
    return markdown(
        ("task", "case", "n", "full prefill", "copies alone", *rivals, "**trace**",
         "trace - full, 95%", "recomputed", "computed", "declined"),
        [
            (
                task, case, str(found[OURS]["n"]),
                _share(found, OURS, "{accuracy_full:.3f}"),
                _share(found, OURS, "{accuracy_copy:.3f}"),
                *(_share(found, name, "{accuracy:.3f} ({computed_share:.0%})") for name in RIVALS),
                _share(found, OURS, "**{accuracy:.3f}**"),
                points(found[OURS]["ci95"]),
                *(_share(found, OURS, f"{{{key}:.1%}}")
                  for key in ("recomputed_share", "computed_share", "declined")),
            )
            for (task, case), found in compared(rows).items()
            if task != "text"
        ],
    )  # fmt: skip


def first_tokens(rows: list[Row]) -> list[str]:
    """Agreement and KL at the first token of the answer, where no more was followed."""
    names = ("copy", *RIVALS, OURS)
    labels = [LABELS[name] for name in names]
    return markdown(
        ("task", "case", *(f"as in full: {label}" for label in labels),
         *(f"KL: {label}" for label in labels)),
        [
            (
                task, case,
                *(_share(found, name, "{top1:.1%}") for name in names),
                *(_share(found, name, "{kl:.4f}") for name in names),
            )
            for (task, case), found in compared(rows).items()
            if case != "splice"
        ],
    )  # fmt: skip


def agreement(rows: list[Row]) -> list[str]:
    """Along full prefill's own continuation of a splice."""

    def share(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return markdown(
        ("task", "selector", "budget", "top-1", "top-1 where sure", "KL", "ROUGE-L", "recomputed",
         "computed"),
        [
            (
                r["task"], r["selector"], f"{r['budget']:.2f}", f"{r['top1']:.1%}",
                share(r["top1_sure"], ".1%"), f"{r['kl']:.4f}", share(r["rouge_l"], ".3f"),
                f"{r['recomputed_share']:.1%}", f"{r['computed_share']:.1%}",
            )
            for r in rows
            if r["case"] == "splice" and r["selector"] != "full"
        ],
    )  # fmt: skip


def prose(rows: list[Row]) -> list[str]:
    """Perplexity of the true continuation of held-out prose."""
    return markdown(
        ("selector", "budget", "n", "perplexity / full prefill's", "recomputed", "computed"),
        [
            (
                r["selector"], f"{r['budget']:.2f}", str(r["n"]),
                f"{r['perplexity'] / r['perplexity_full']:.4f}", f"{r['recomputed_share']:.1%}",
                f"{r['computed_share']:.1%}",
            )
            for r in rows
            if r["task"] == "text"
        ],
    )  # fmt: skip


def lists(rows: list[Row]) -> list[str]:
    """Whole lists right, with and without refresh while decoding."""
    return markdown(
        ("task", "n", "full prefill", "trace alone", "trace and refresh", "refresh - full, 95%",
         "lists that refreshed", "rows refreshed"),
        [
            (
                r["task"], str(r["n"]), f"{r['accuracy_full']:.3f}", f"{r['accuracy_off']:.3f}",
                f"**{r['accuracy_on']:.3f}**", points(r["ci95"]), f"{r['refreshing']:.1%}",
                f"{r['refreshed_rows']:.0f}",
            )
            for r in rows
        ],
    )  # fmt: skip


def gate(rows: list[Row]) -> list[str]:
    """What a gate on deviation catches, and what it wastes."""
    return markdown(
        ("check layer", "n", "led astray", "AUC", "tau", "caught", "tau", "wasted"),
        [
            (
                str(r["layer"]), str(r["n"]), str(r["astray"]), f"{r['auc']:.3f}",
                f"{r['tau_few_wasted']:.3f}", f"{r['caught']:.1%}", f"{r['tau_most_caught']:.3f}",
                f"{r['wasted']:.1%}",
            )
            for r in rows
        ],
    )  # fmt: skip


def streams(rows: list[Row]) -> list[str]:
    """Requests one after another, by how often reuse may build on reuse."""
    return markdown(
        ("source depth at most", "n", "accuracy", "full prefill", "reusing", "tokens reused",
         "slope per 100", "chance"),
        [
            (
                str(r["source_depth"]), str(r["n"]), f"{r['accuracy']:.3f}",
                f"{r['accuracy_full']:.3f}", f"{r['reusing']:.1%}", f"{r['reused_share']:.1%}",
                f"{r['slope_per_100']:+.4f}",
                f"{r['chance95'][0]:+.4f} to {r['chance95'][1]:+.4f}",
            )
            for r in rows
        ],
    )  # fmt: skip


# by the name of its marks: which part of a result it needs, and what makes it
TABLES: dict[str, tuple[str, Callable[[list[Row]], list[str]]]] = {
    "answers": ("rows", answers),
    "answers-by-case": ("rows", by_case),
    "first-tokens": ("rows", first_tokens),
    "agreement": ("rows", agreement),
    "prose": ("rows", prose),
    "lists": ("decode", lists),
    "gate": ("gate", gate),
    "streams": ("stream", streams),
}
