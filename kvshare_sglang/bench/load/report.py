"""A load test as one HTML page with its plots inside: nothing on it is fetched."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvshare_sglang.bench.common import KINDS
from kvshare_sglang.bench.load import summary
from kvshare_sglang.bench.load.outcomes import Outcome

_COLOURS = ("#9aa3ad", "#3b6ea5", "#e07b39", "#5b8f57", "#8e5ea2", "#b8a02e", "#c0504d", "#2e9ca6")
_BY_KIND = dict(zip(KINDS, ("#8fb08c", "#c6d9b7", "#3b6ea5", "#e07b39", "#f2c49b"), strict=True))
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "pre{overflow-x:auto;background:#f5f6f8;padding:1em}svg{max-width:100%;height:auto}"
    "p.note{color:#555}"
)

Runs = Mapping[str, Sequence[Sequence[Outcome]]]  # by configuration: its repeats


def write(path: Path, runs: Runs, *, table: str, facts: Mapping[str, Any]) -> None:
    """The page of a load test: ``table`` as it is printed, ``facts`` as a list below it."""
    told = "".join(
        f"<li><b>{html.escape(name)}</b>: {html.escape(str(value))}</li>"
        for name, value in facts.items()
    )
    plots = "".join(
        f"<h2>{title}</h2><p class=note>{note}</p>{picture(runs)}"
        for title, note, picture in (
            ("Time to the first token", "Share of all requests, over repeats, that had their "
             "first token within this time after they were due.", _distribution),
            ("Waiting requests", "Due and without a first token, over the trace; the first "
             "repeat. A line that does not come down is a server that does not keep up.", _queue),
            ("What became of prompt tokens", "By when requests were due; first repeat.", _kinds),
            *([("Tenants", "Mean time to the first token of each, over repeats; the mark is "
                "its p99.", _tenants)] if _named(runs) else []),
        )
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Load test</title>"
        f"<style>{_STYLE}</style><h1>Load test</h1><pre>{html.escape(table)}</pre>"
        f"<ul>{told}</ul>{plots}</html>\n",
        encoding="utf-8",
    )


def _named(runs: Runs) -> list[str]:
    every = (one.tenant for its in runs.values() for run in its for one in run)
    return sorted({tenant for tenant in every if tenant is not None})


def _figure(height: float = 3.6, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(1, columns, figsize=(10, height), sharey=True, squeeze=False)


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    out = io.StringIO()
    figure.tight_layout()
    figure.savefig(out, format="svg")
    plt.close(figure)
    return "<svg" + out.getvalue().partition("<svg")[2]


def _distribution(runs: Runs) -> str:
    figure, ((axes,),) = _figure()
    for (name, its), colour in zip(runs.items(), _cycle(len(runs)), strict=True):
        waits = np.sort([one.ttft_s for run in its for one in run if one.ok])
        axes.step(waits, np.arange(1, len(waits) + 1) / len(waits), where="post",
                  color=colour, label=name)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("share of requests")
    axes.legend(frameon=False)
    return _svg(figure)


def _queue(runs: Runs) -> str:
    figure, ((axes,),) = _figure()
    for (name, its), colour in zip(runs.items(), _cycle(len(runs)), strict=True):
        axes.step(*summary.waiting_over_time(its[0]), where="post", color=colour, label=name)
    axes.set_xlabel("seconds from the start of the trace")
    axes.set_ylabel("requests")
    axes.legend(frameon=False)
    return _svg(figure)


def _kinds(runs: Runs) -> str:
    figure, (row,) = _figure(3.2, columns=len(runs))
    for axes, (name, its) in zip(row, runs.items(), strict=True):
        times, shares = summary.shares_over_time(its[0])
        axes.stackplot(times, [shares[kind] for kind in KINDS], labels=KINDS,
                       colors=[_BY_KIND[kind] for kind in KINDS])  # fmt: skip
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("seconds")
        axes.set_ylim(0, 1)
    row[0].set_ylabel("share of prompt tokens")
    row[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _svg(figure)


def _tenants(runs: Runs) -> str:
    names = _named(runs)
    figure, ((axes,),) = _figure()
    width = 0.8 / len(runs)
    for i, ((name, its), colour) in enumerate(zip(runs.items(), _cycle(len(runs)), strict=True)):
        told = summary.by_tenant([one for run in its for one in run])
        places = np.arange(len(names)) + (i - (len(runs) - 1) / 2) * width
        for key, draw in (("ttft_mean_s", "bar"), ("ttft_p99_s", "mark")):
            values = [told[tenant][key] if tenant in told else 0.0 for tenant in names]
            if draw == "bar":
                axes.bar(places, values, width, color=colour, label=name)
            else:
                axes.plot(places, values, "_", color="black", markersize=60 * width)
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)
    return _svg(figure)


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]
