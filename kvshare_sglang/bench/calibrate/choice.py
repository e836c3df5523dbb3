"""Which layer, stretch and budget the measured prompts speak for, and whether answers hold."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvshare_sglang.bench import common
from kvshare_sglang.bench.calibrate.measure import Candidate, Measured, Row
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.attention_trace import probe_layer
from kvshare_sglang.policy.shadow import FLOOR, Z, upper_bound

# The default, and what models may need besides.
BUDGETS = (KVShareConfig().budget, 0.2, 0.25, 0.3, 0.5)
QUARTILE = 0.75
OTHERS = 0.05  # of the tokens that are sampled, at most so many are others with a budget


class Best(NamedTuple):
    """``means``: over prompts, by arm."""

    chosen: Candidate
    holds: bool
    means: dict[Candidate | None, Measured]


def choose(rows: Sequence[Row]) -> Candidate:
    """The cheapest candidate that is within one standard error of the best, over pairs (the
    one-standard-error rule of Breiman et al. 1984). They are judged by the mean of sqrt(KL / 2),
    which bounds how often a sampled token is another one (Pinsker)."""
    off = _off(rows)
    best = min(off, key=lambda arm: float(off[arm].mean()))
    return next(arm for arm in sorted(off) if _as_good(off[arm], off[best]))


def judge(rows: Sequence[Row]) -> Best:
    """Of one candidate with several budgets the least with which the mean of sqrt(KL / 2) is at
    most ``OTHERS``, else the largest; and whether answers hold with it.

    They hold where it is closer to full prefill than copies alone, that mean is surely at most what
    ``--kvshare-shadow-floor`` leaves to other tokens, and its first tokens are not surely less
    often those of full prefill than that asks for. Few prompts do not show the former; the latter
    is lenient, since tokens that are as likely change places for no reason.
    """
    off = _off(rows)
    found = means(rows)
    by_budget = sorted(off, key=lambda arm: arm.budget)
    chosen = next((arm for arm in by_budget if off[arm].mean() <= OTHERS), by_budget[-1])
    same = round(found[chosen].agree * len(rows))
    closer = found[chosen].kl < found[None].kl
    holds = closer and _surely_close(off[chosen]) and upper_bound(same, len(rows)) >= FLOOR
    return Best(chosen, holds, found)


def is_better(mine: Sequence[Row], theirs: Sequence[Row]) -> bool:
    """Whether the one candidate of some prompts is closer to full prefill than the one of the same
    prompts beside them, by more than one standard error of the pairs."""
    (off,), (other,) = _off(mine).values(), _off(theirs).values()
    num = min(len(off), len(other))
    less = other[:num] - off[:num]
    return bool(less.mean() > less.std(ddof=1) / np.sqrt(num))


def enough(rows: Sequence[Row]) -> bool:
    """Whether one of their budgets is."""
    return others(rows) <= OTHERS


def others(rows: Sequence[Row]) -> float:
    """The mean of sqrt(KL / 2) of the best of their candidates."""
    return min(float(off.mean()) for off in _off(rows).values())


def _off(rows: Sequence[Row]) -> dict[Candidate, np.ndarray]:
    """By candidate, sqrt(KL / 2) of each prompt."""
    arms = [arm for arm in rows[0] if arm is not None]
    return {arm: np.sqrt(np.array([row[arm].kl for row in rows]).clip(0) / 2) for arm in arms}


def _surely_close(off: np.ndarray) -> bool:
    """Whether the mean is at most 1 - ``FLOOR``, up to the end of its 95% interval, which fewer
    prompts make wider."""
    return bool(off.mean() + Z * off.std(ddof=1) / np.sqrt(len(off)) <= 1 - FLOOR)


def _as_good(mine: np.ndarray, best: np.ndarray) -> bool:
    more = mine - best
    return bool(more.mean() <= more.std(ddof=1) / np.sqrt(len(more)))


def means(rows: Sequence[Row]) -> dict[Candidate | None, Measured]:
    """Over prompts, by arm; of what margins move by the upper quartile: more than in most kinds of
    reuse, and less than where a statement was missed, which no look at margins finds. Of what the
    end of a prompt moves by the lower quartile of that half whose margins move most: all that move
    as much are as these."""
    found = {}
    for arm in rows[0]:
        mine = np.array([row[arm] for row in rows])
        mean = Measured(*map(float, mine.mean(axis=0)))
        noise = np.array([row[arm].noise for row in rows])
        most = np.array([row[arm].shift for row in rows])[noise >= np.median(noise)]
        found[arm] = mean._replace(
            noise=float(np.quantile(noise, QUARTILE)), shift=float(np.quantile(most, 1 - QUARTILE))
        )
    return found


def show(best: Best, prompts: int, *, layers: int, depends: Best | None) -> str:
    rows = [
        {"arm": "copies alone" if arm is None else _name(arm, layers), **mean._asdict()}
        for arm, mean in best.means.items()
    ]
    table = common.columns(
        rows, arm="{arm}", KL="{kl:.4f}", of_the_first_token="{kl_first:.4f}",
        same_first_token="{agree:.1%}", margin_moves="{noise:.2f}", end_moves="{shift:.3f}",
        FLOPs="{computed:.0%}",
    )  # fmt: skip
    verdict = "answers hold" if best.holds else "answers suffer: only requests that ask reuse"
    text = f"{table}\n{prompts} prompts: {_name(best.chosen, layers)}; {verdict}"
    return text + (f"; on CPUs {_name(depends.chosen, layers)}" if depends else "")


def _name(arm: Candidate, layers: int) -> str:
    depends = f", depends {probe_layer(layers, arm.depends_at)}" if arm.depends_at else ""
    probe = f"probe layer {arm.layer(layers)}, stretch {arm.stretch}"
    return f"{probe}, budget {arm.budget:g}{depends}"
