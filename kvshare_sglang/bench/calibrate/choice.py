"""Which layer and stretch the measured prompts speak for, and whether answers hold with them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvshare_sglang.bench import common
from kvshare_sglang.bench.calibrate.measure import Candidate, Measured, Row
from kvshare_sglang.policy.shadow import FLOOR, Z, upper_bound


class Best(NamedTuple):
    """``means``: over prompts, by arm."""

    chosen: Candidate
    holds: bool
    means: dict[Candidate | None, Measured]


def choose(rows: Sequence[Row]) -> Best:
    """The cheapest candidate that is within one standard error of the best, over pairs (the
    one-standard-error rule of Breiman et al. 1984). They are judged by the mean of sqrt(KL / 2),
    which bounds how often a sampled token is another one (Pinsker).

    Answers hold where the chosen one is closer to full prefill than copies alone, that mean is
    surely at most what ``--kvshare-shadow-floor`` leaves to other tokens, and its first tokens are
    not surely less often those of full prefill than that asks for. Few prompts do not show the
    former; the latter is lenient, since tokens that are as likely change places for no reason.
    """
    values = {arm: np.array([row[arm] for row in rows]) for arm in rows[0]}
    means = {arm: Measured(*map(float, them.mean(axis=0))) for arm, them in values.items()}
    off = {arm: np.sqrt(them[:, 0].clip(0) / 2) for arm, them in values.items() if arm is not None}
    best = min(off, key=lambda arm: float(off[arm].mean()))
    chosen = next(arm for arm in sorted(off) if _as_good(off[arm], off[best]))
    same = round(means[chosen].agree * len(rows))
    closer = means[chosen].kl < means[None].kl
    holds = closer and _surely_close(off[chosen]) and upper_bound(same, len(rows)) >= FLOOR
    return Best(chosen, holds, means)


def _surely_close(off: np.ndarray) -> bool:
    """Whether the mean is at most 1 - ``FLOOR``, up to the end of its 95% interval, which fewer
    prompts make wider."""
    return bool(off.mean() + Z * off.std(ddof=1) / np.sqrt(len(off)) <= 1 - FLOOR)


def _as_good(mine: np.ndarray, best: np.ndarray) -> bool:
    more = mine - best
    return bool(more.mean() <= more.std(ddof=1) / np.sqrt(len(more)))


def show(best: Best, prompts: int, *, layers: int) -> str:
    rows = [
        {"arm": "copies alone" if arm is None else _name(arm, layers), **mean._asdict()}
        for arm, mean in best.means.items()
    ]
    table = common.columns(
        rows, arm="{arm}", KL="{kl:.4f}", of_the_first_token="{kl_first:.4f}",
        same_first_token="{agree:.1%}", FLOPs="{computed:.0%}",
    )  # fmt: skip
    verdict = "answers hold" if best.holds else "answers suffer: only requests that ask reuse"
    return f"{table}\n{prompts} prompts: {_name(best.chosen, layers)}; {verdict}"


def _name(arm: Candidate, layers: int) -> str:
    return f"probe layer {arm.layer(layers)}, stretch {arm.stretch}"
