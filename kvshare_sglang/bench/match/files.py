"""Request files through each matcher and cache: what is found, what it is worth, what it costs.

*Beyond* counts the tokens in runs after the exact prefix, *useful* what of them is worth a copy
(``sim/useful.py``). The capacities are shares of the tokens that SGLang's own tree would hold
of the file without limit.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench.common import Progress
from kvshare_sglang.bench.match import memory
from kvshare_sglang.bench.match.baselines import MATCHERS, FixedAnyOffset, Prefix
from kvshare_sglang.bench.match.ceiling import ceiling, ceiling_row
from kvshare_sglang.bench.match.requests import Requests
from kvshare_sglang.radix_fuzzy.index import Bools
from kvshare_sglang.sim.life import ANY_DEPTH, Life, Served
from kvshare_sglang.sim.matcher import KVShare, Matcher
from kvshare_sglang.sim.radix import Policy, by_frequency, lru

CURVE = (32, 64, 128, 256, 512)  # chunk lengths of the fixed matcher in the plot
LENGTHS = (0, 1024, 2048, 4096, 8192, 16384, 32768, 1 << 30)  # of prompts, for lookup times


class Setting(NamedTuple):
    """How the cache lives; ``keep_all`` as in ``Life``."""

    capacity: float | None = None
    max_depth: int = ANY_DEPTH
    keep_all: bool = False


SETTINGS = {
    "unlimited": Setting(keep_all=True),
    "cap10": Setting(capacity=0.1),
    "cap30": Setting(capacity=0.3),
    "depth0": Setting(max_depth=0),
    "depth1": Setting(max_depth=1),
    # Not in the standard set: no limit and any depth, but copies are not kept.
    "anydepth": Setting(),
}
STANDARD = ("unlimited", "cap10", "cap30", "depth0", "depth1")


class Arm(NamedTuple):
    """A row of the result: a matcher, and what its cache evicts first."""

    make: Callable[[], Matcher]
    policy: Policy = lru
    keep_all: bool = False  # whatever the setting says
    only_capped: bool = False


ARMS = {
    **{name: Arm(make) for name, make in MATCHERS.items()},
    "kvshare": Arm(KVShare, by_frequency),
    "kvshare-lru": Arm(KVShare, only_capped=True),
    "kvshare-lru-whole": Arm(KVShare, keep_all=True, only_capped=True),
}


class Replayed(NamedTuple):
    served: list[Served]
    life: Life


def replay(
    requests: Requests, arm: Arm, setting: Setting, *, distinct: int, bar: Progress
) -> Replayed:
    capacity = None if setting.capacity is None else int(setting.capacity * distinct)
    life = Life(
        arm.make(),
        capacity=capacity,
        max_depth=setting.max_depth,
        keep_all=setting.keep_all or arm.keep_all,
        policy=arm.policy,
    )
    served = []
    for space, prompt in zip(requests.spaces, requests.prompts, strict=True):
        served.append(life.serve(space, prompt))
        bar.update(len(prompt))
    return Replayed(served, life)


def row(done: Replayed, covered: Sequence[Bools], make: Callable[[], Any]) -> dict[str, Any]:
    """What the JSON says of one matcher in one setting."""
    served, life = done
    total = sum(s.prompt_len for s in served)
    found = sum(s.found for s in served)
    there = sum(int(c[s.prefix_len :].sum()) for c, s in zip(covered, served, strict=True))
    inserted = sum(s.inserted for s in served)
    lookups = np.array([s.lookup_s for s in served]) * 1e3
    lengths = np.array([s.prompt_len for s in served])
    bytes_per_token = None
    if life.resident and life.matcher.__class__ is not Prefix:
        bytes_per_token = memory.measure(make, life.log) / life.resident
        if not life.matcher.copies_tokens:
            bytes_per_token += 4  # a view of the prompt is instead of tokens of its own
    return {
        "prefix_share": sum(s.prefix_len for s in served) / total,
        "beyond_share": found / total,
        "useful_share": sum(s.num_useful for s in served) / total,
        # Where reuse leaves less exact text, useful text makes up for lost prefixes.
        "saved_share": sum(s.prefix_len + s.num_useful for s in served) / total,
        "share_of_ceiling": found / there if there else None,
        "runs_mean": float(np.mean([len(s.runs) for s in served])),
        "edits_mean": float(np.mean([s.edits for s in served])),
        "lookup_ms_p50": float(np.median(lookups)),
        "lookup_ms_p99": float(np.quantile(lookups, 0.99)),
        "lookup_ms_by_len": {
            f"{lo}-{hi}": [float(np.quantile(lookups[at], q)) for q in (0.5, 0.99)]
            for lo, hi in pairwise(LENGTHS)
            if (at := (lengths >= lo) & (lengths < hi)).any()
        },
        "insert_ms_p50": float(np.median([s.insert_s for s in served]) * 1e3),
        "insert_ms_per_8k": sum(s.insert_s for s in served) / max(inserted, 1) * 8192e3,
        "bytes_per_token": bytes_per_token,
        "resident_tokens": life.resident,
        "distinct_share": life.tree.distinct_share(),
        "not_stored": life.not_stored,
        "unequal_tokens": sum(s.unequal for s in served),
    }


def bench_files(
    files: Sequence[Requests], settings: dict[str, Setting], matchers: Sequence[str]
) -> dict[str, Any]:
    """``{file: {setting: {matcher: row}}}``."""
    out: dict[str, Any] = {}
    arms = {
        name: [
            matcher
            for matcher in matchers
            if matcher in ARMS and (setting.capacity or not ARMS[matcher].only_capped)
        ]
        for name, setting in settings.items()
    }
    work = sum(f.num_tokens for f in files) * (1 + sum(map(len, arms.values())))
    with Progress(work, unit=" tokens") as bar:
        for requests in files:
            bar.say(requests.name)
            covered = ceiling(requests.prompts, requests.spaces)
            alone = replay(requests, ARMS["prefix"], SETTINGS["unlimited"], distinct=0, bar=bar)
            distinct = alone.life.resident
            out[requests.name] = {}
            for name, setting in settings.items():
                rows = out[requests.name][name] = {}
                for matcher in arms[name]:
                    bar.say(f"{requests.name} {name} {matcher}")
                    arm = ARMS[matcher]
                    done = replay(requests, arm, setting, distinct=distinct, bar=bar)
                    rows[matcher] = row(done, covered, arm.make)
                if "ceiling" in matchers:
                    rows["ceiling"] = ceiling_row(alone.served, covered)
        bar.say("files replayed")
    return out


def bench_curve(files: Sequence[Requests]) -> dict[str, Any]:
    """Useful share by chunk length: fixed lengths at any offset, and the tree's own runs."""
    out: dict[str, Any] = {}
    arms = {str(n): Arm(lambda n=n: FixedAnyOffset(n)) for n in CURVE}  # type: ignore[misc]
    arms["kvshare"] = ARMS["kvshare"]
    with Progress(sum(f.num_tokens for f in files) * len(arms), unit=" tokens") as bar:
        for requests in files:
            rows = out[requests.name] = {}
            for name, arm in arms.items():
                bar.say(f"{requests.name} chunks of {name}")
                served = replay(requests, arm, SETTINGS["unlimited"], distinct=0, bar=bar).served
                runs = [run.length for s in served for run in s.runs]
                rows[name] = {
                    "useful_share": sum(s.num_useful for s in served) / requests.num_tokens,
                    "beyond_share": sum(s.found for s in served) / requests.num_tokens,
                    "run_len_mean": float(np.mean(runs)) if runs else None,
                    "run_len_p50": float(np.median(runs)) if runs else None,
                }
        bar.say("chunk lengths compared")
    return out
