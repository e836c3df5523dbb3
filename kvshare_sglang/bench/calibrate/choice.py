"""Which layer the measured prompts speak for, and whether answers hold with it."""

from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench import common
from kvshare_sglang.policy.shadow import FLOOR, upper_bound


class Found(NamedTuple):
    """What was measured: a row for each prompt, by arm; candidates go by their depth."""

    rows: list[dict[str, Any]]

    @property
    def prompts(self) -> int:
        return len(self.rows)

    @property
    def depths(self) -> list[float]:
        """Ascending."""
        names = {name for row in self.rows for name in row} - {"case", "tokens", "copies"}
        return sorted(map(float, names))

    def values(self, arm: str, name: str) -> np.ndarray:
        return np.array([row[arm][name] for row in self.rows])

    def means(self, arm: str) -> dict[str, float]:
        names = ("kl", "kl_first", "agree", "computed")
        return {name: float(self.values(arm, name).mean()) for name in names}


class Best(NamedTuple):
    probe_at: float
    holds: bool
    check: dict[str, dict[str, float]]
    candidates: list[dict[str, float]]


def choose(found: Found) -> Best:
    """The shallowest candidate that is within one standard error of the best, over pairs (the
    one-standard-error rule of Breiman et al. 1984): a deeper one costs more. They are judged by the
    mean of sqrt(KL / 2), which bounds how often a sampled token is another one (Pinsker).

    Answers hold where the chosen one is closer to full prefill than copies alone, and its first
    tokens are not surely less often those of full prefill than ``--kvshare-shadow-floor`` asks for.
    """
    depths = found.depths
    off = {depth: np.sqrt(found.values(str(depth), "kl").clip(0) / 2) for depth in depths}
    best = min(depths, key=lambda depth: off[depth].mean())
    probe_at = next(depth for depth in depths if _as_good(off[depth], off[best]))
    trace, copies = found.means(str(probe_at)), found.means("copies")
    same = int(found.values(str(probe_at), "agree").sum())
    holds = trace["kl"] < copies["kl"] and upper_bound(same, found.prompts) >= FLOOR
    candidates = [{"probe_at": depth, **found.means(str(depth))} for depth in depths]
    return Best(probe_at, bool(holds), {"trace": trace, "copies": copies}, candidates)


def _as_good(mine: np.ndarray, best: np.ndarray) -> bool:
    more = mine - best
    return bool(more.mean() <= more.std(ddof=1) / np.sqrt(len(more)))


def show(found: Found, best: Best, layers: dict[int, float]) -> str:
    by_depth = {depth: layer for layer, depth in layers.items()}
    rows = [{"arm": f"trace, layer {by_depth[one['probe_at']]}", **one} for one in best.candidates]
    rows.append({"arm": "copies alone", **best.check["copies"]})
    table = common.columns(
        rows, arm="{arm}", KL="{kl:.4f}", of_the_first_token="{kl_first:.4f}",
        same_first_token="{agree:.1%}", FLOPs="{computed:.0%}",
    )  # fmt: skip
    verdict = "answers hold" if best.holds else "answers suffer: servers compute twice the rows"
    chosen = f"probe layer {by_depth[best.probe_at]} (--kvshare-probe-at {best.probe_at:g})"
    return f"{table}\n{found.prompts} prompts: {chosen}; {verdict}"
