"""Near twins and templates made from the files' own text, where each token's fate is known.

A twin is a cached text with bursts of 1 to 8 tokens substituted, inserted or deleted at random
places. A template is cached with its slots filled; the prompt fills them anew.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench.common import Progress, table
from kvshare_sglang.bench.match import baselines
from kvshare_sglang.bench.match.requests import Requests
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.life import Life
from kvshare_sglang.sim.matcher import Matcher

SHARES = {"5%": 0.05, "10%": 0.10, "20%": 0.20}
CASES = 40
LENGTH = 4096
MATCHERS = ("fixed-any-offset", "winnow", "kvshare")


class Case(NamedTuple):
    """A cached text, a prompt, which of its tokens should be found, and the edits between."""

    cached: Tokens
    prompt: Tokens
    same: np.ndarray
    edits: int


class Text:
    """Stretches of real prompts, each given out from a random place."""

    def __init__(self, files: Sequence[Requests], rng: np.random.Generator) -> None:
        self._all = np.concatenate([prompt for file in files for prompt in file.prompts])
        self._rng = rng

    def take(self, num: int) -> Tokens:
        at = int(self._rng.integers(len(self._all) - num))
        return self._all[at : at + num]

    def words(self, num: int) -> Tokens:
        """Tokens as frequent as in the text, in no order."""
        return self._rng.choice(self._all, num)


def twin(text: Text, share: float, rng: np.random.Generator) -> Case:
    base = text.take(LENGTH)
    bursts = _bursts(round(share * LENGTH), rng)
    # At least one token is left between two bursts.
    room = LENGTH - sum(bursts) - len(bursts)
    gaps = np.diff(np.sort(rng.integers(0, room + 1, len(bursts))), prepend=0) + 1
    parts: list[Tokens] = [text.words(200)]
    same = [np.zeros(200, bool)]
    at = 0
    for gap, size in zip(gaps.tolist(), bursts, strict=True):
        parts.append(base[at : at + gap])
        same.append(np.ones(gap, bool))
        at += gap
        kind = rng.integers(3)
        if kind != 0:  # 0: delete, 1: insert, 2: substitute
            parts.append(text.words(size))
            same.append(np.zeros(size, bool))
        if kind != 1:
            at += size
    parts.append(base[at:])
    same.append(np.ones(LENGTH - at, bool))
    return Case(
        np.concatenate([text.words(100), base]),
        np.concatenate(parts).astype(np.int32),
        np.concatenate(same),
        len(bursts),
    )


def template(text: Text, rng: np.random.Generator) -> Case:
    base = text.take(LENGTH)
    sides: tuple[list[Tokens], list[Tokens]] = [text.words(100)], [text.words(200)]
    same = [np.zeros(200, bool)]
    at = slots = 0
    while at < LENGTH:
        size = int(rng.integers(10, 41))
        frame = base[at : at + size]
        at += size
        fills = [text.words(int(rng.integers(1, 13))) for _ in sides]
        for side, fill in zip(sides, fills, strict=True):
            side += [frame, fill]
        same += [np.ones(len(frame), bool), np.zeros(len(fills[1]), bool)]
        slots += 1
    cached, prompt = (np.concatenate(side).astype(np.int32) for side in sides)
    return Case(cached, prompt, np.concatenate(same), slots)


def _bursts(total: int, rng: np.random.Generator) -> list[int]:
    out: list[int] = []
    while sum(out) < total:
        out.append(min(int(rng.integers(1, 9)), total - sum(out)))
    return out


def measure(files: Sequence[Requests], *, seed: int = 0) -> dict[str, Any]:
    """``{"twins": {share: {matcher: row}}, "templates": {matcher: row}}``."""
    kinds: dict[str, Callable[[Text, np.random.Generator], Case]] = {
        name: lambda text, rng, share=share: twin(text, share, rng)  # type: ignore[misc]
        for name, share in SHARES.items()
    }
    kinds["templates"] = template
    rows: dict[str, Any] = {}
    with Progress(len(kinds) * len(MATCHERS), unit=" groups") as bar:
        for name, make in kinds.items():
            rng = np.random.default_rng(seed)
            text = Text(files, rng)
            cases = [make(text, rng) for _ in range(CASES)]
            rows[name] = {}
            for matcher in MATCHERS:
                bar.say(f"{name} {matcher}")
                rows[name][matcher] = _row(cases, baselines.MATCHERS[matcher]())
                bar.update()
        bar.say("edits measured")
    return {"twins": {name: rows[name] for name in SHARES}, "templates": rows["templates"]}


def _row(cases: Sequence[Case], matcher: Matcher) -> dict[str, Any]:
    life = Life(matcher, keep_all=True)
    for case in cases:
        life.serve(None, case.cached)
    found = there = runs = edits = useful = 0
    times = []
    for case in cases:
        seen = life.look(None, case.prompt)
        covered = np.zeros(len(case.prompt), bool)
        for run in seen.runs:
            covered[run.dst_start : run.dst_stop] = True
        found += int((covered & case.same).sum())
        there += int(case.same.sum())
        runs += len(seen.runs)
        edits += case.edits
        useful += seen.num_useful
        times.append(seen.lookup_s)
    return {
        "found": found / there,
        "runs_per_edit": runs / edits,
        "useful": useful / there,
        "lookup_ms_p50": float(np.median(times) * 1e3),
    }


def show(result: dict[str, Any]) -> str:
    groups = {**{f"twins {k}": v for k, v in result["twins"].items()},
              "templates": result["templates"]}  # fmt: skip
    cells = [
        (f"{group} {matcher}", f"{r['found']:.1%}", f"{r['runs_per_edit']:.2f}",
         f"{r['useful']:.1%}", f"{r['lookup_ms_p50']:.2f}")
        for group, rows in groups.items()
        for matcher, r in rows.items()
    ]  # fmt: skip
    head = ("synthetic, 4k tokens", "found", "runs/edit", "useful", "p50 ms")
    return table(head, cells)
