"""What a request costs on a worker, in rows of prefill, and in which order workers are named. Pure.

``cost = (AFFINITY * (rows that would run + copies) + what is before it) / pace``. Rows are those of
the worker's own selectors and its own admission, so what is predicted is what it will do. A row
that runs delays all who come after it too, and its text displaces other text; a row that waits
delays this request alone. So they do not count alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import Run
from kvshare_sglang.policy.admit import pays
from kvshare_sglang.policy.options import RequestOptions
from kvshare_sglang.policy.schedule import COPY
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.policy.select.base import Selector
from kvshare_sglang.policy.select.dhd import Dhd
from kvshare_sglang.policy.select.window import Window

AFFINITY = 4.0  # rows that run count so often as rows that wait before them
DECODING = 16  # rows: what one request that decodes adds, a row in each step beside the prefill
FASTER = 4.0  # than the mean of all: what is told of a worker's pace counts so far at most
SLACK = 0.1  # of the prompt: cheaper by less than this is no reason to pile text on one worker


UNSAID = ""  # the mode of a request that names none: what it gets is the worker's to say


class Work(NamedTuple):
    """Tokens of a prompt: ``rows`` will run (at most, where a trace chooses them), ``copied`` at
    least, ``exact`` are its prefix hit."""

    rows: int
    copied: int
    exact: int


class Standing(NamedTuple):
    """How a worker stands. ``rows`` wait or run before a new request, ``running`` requests decode,
    ``held`` tokens are cached. ``avoid``: it is not known to answer."""

    rows: float = 0
    running: int = 0
    rows_per_s: float = 0
    held: int = 0
    avoid: bool = False


def selector_of(config: KVShareConfig) -> Selector:
    """Who chooses rows on a worker with this configuration."""
    if config.select == "window":
        return Window(config.seam, config.window)
    if config.select == "dhd":
        return Dhd(config.seam, config.window, config.tau)
    return AttentionTrace(config.seam)


def mode_of(config: KVShareConfig, options: RequestOptions) -> str:
    return config.default if options.mode == UNSAID else options.mode


def budget_of(config: KVShareConfig, options: RequestOptions) -> float:
    return config.budget if options.budget is None else options.budget


def work_of(
    runs: Sequence[Run],
    config: KVShareConfig,
    options: RequestOptions,
    *,
    prompt_len: int,
    prefix_len: int,
) -> Work:
    """What the worker does with ``runs``, which ascend and are disjoint after its prefix hit."""
    every = prompt_len - prefix_len
    if mode_of(config, options) == "exact" or not runs:
        return Work(every, 0, prefix_len)
    selector, budget = selector_of(config), budget_of(config, options)
    plan = selector.plan(runs, prompt_len=prompt_len, prefix_len=prefix_len, budget=budget)
    rows = selector.most_rows(plan, budget=budget)
    if pays(plan, config, rows=rows) is not None:
        return Work(every, 0, prefix_len)
    return Work(rows, every - rows, prefix_len)


def order(
    works: Sequence[Work | None], standings: Sequence[Standing], *, prompt_len: int
) -> list[int]:
    """Workers from the best to the worst; those whose work is None are left out.

    Among those that are about as cheap as the cheapest (``SLACK``), that with the least text comes
    first: new text goes where it displaces least. Workers to avoid come last. Ties go by number.
    """
    paces = [s.rows_per_s for s in standings if s.rows_per_s > 0]
    usual = sum(paces) / len(paces) if paces else 1.0

    def cost(i: int, work: Work) -> float:
        one = standings[i]
        rows = AFFINITY * (work.rows + COPY * work.copied) + one.rows + DECODING * one.running
        pace = min(max(one.rows_per_s or usual, usual / FASTER), usual * FASTER)
        return rows / pace * usual

    costs = {i: cost(i, work) for i, work in enumerate(works) if work is not None}
    ranked = sorted(costs, key=lambda i: (standings[i].avoid, costs[i], standings[i].held, i))
    if not ranked:
        return []
    cheapest = ranked[0]
    alike = [
        i
        for i in ranked
        if standings[i].avoid == standings[cheapest].avoid
        and costs[i] <= costs[cheapest] + SLACK * prompt_len
    ]
    best = min(alike, key=lambda i: (standings[i].held, costs[i], i))
    return [best, *(i for i in ranked if i != best)]
