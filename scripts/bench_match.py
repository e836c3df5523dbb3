"""Replay request files through the matchers, without a model, and compare what they find.

Each request is served by a model of SGLang's radix cache (``_life``) that tells a matcher what it
stores and evicts. *Beyond* counts the tokens in runs behind the exact prefix, *useful* what of them
is worth a copy (``_useful``). The capacities are shares of the tokens that SGLang's own tree would
hold of the file without limit. Prompts are encoded as they stand, without a chat template.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import _match_scale
import _match_synthetic
import _matchers
import _memory
import _tokens
import numpy as np
from _life import ANY_DEPTH, Life, Policy, Served, by_worth, lru
from _useful import useful

from kvshare_sglang.radix_fuzzy.index import Bools
from kvshare_sglang.radix_fuzzy.types import Run

PARTS = ("files", "curve", "synthetic", "scale")
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

    make: Callable[[], _matchers.Matcher]
    policy: Policy = lru
    keep_all: bool = False  # whatever the setting says
    only_capped: bool = False


ARMS = {
    **{name: Arm(make) for name, make in _matchers.MATCHERS.items()},
    "kvshare": Arm(_matchers.KVShare, by_worth),
    "kvshare-lru": Arm(_matchers.KVShare, only_capped=True),
    "kvshare-lru-whole": Arm(_matchers.KVShare, keep_all=True, only_capped=True),
}


class Replayed(NamedTuple):
    served: list[Served]
    life: Life


def replay(
    requests: _tokens.Requests, arm: Arm, setting: Setting, *, distinct: int, bar: _bench.Progress
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
    if life.resident and life.matcher.__class__ is not _matchers.Prefix:
        bytes_per_token = _memory.measure(make, life.log) / life.resident
        if not life.matcher.copies_tokens:
            bytes_per_token += 4  # a view of the prompt stands for tokens of its own
    return {
        "prefix_share": sum(s.prefix_len for s in served) / total,
        "beyond_share": found / total,
        "useful_share": sum(s.num_useful for s in served) / total,
        # Where reuse leaves less exact text behind, useful text makes up for lost prefixes.
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
        "distinct_share": life.distinct_share(),
        "not_stored": life.not_stored,
        "unequal_tokens": sum(s.unequal for s in served),
    }


def ceiling_row(served: Sequence[Served], covered: Sequence[Bools]) -> dict[str, Any]:
    """What there is to find behind the prefix. A stretch counts as one run, so that its useful
    share is more than any matcher can have."""
    runs = [_stretches(c, s.prefix_len) for c, s in zip(covered, served, strict=True)]
    total = sum(len(c) for c in covered)
    worth = sum(
        r.length for one, c in zip(runs, covered, strict=True) for r in useful(one, stop=len(c) - 1)
    )
    beyond = sum(r.length for one in runs for r in one)
    nothing = dict.fromkeys(
        ("lookup_ms_p50", "lookup_ms_p99", "insert_ms_p50", "bytes_per_token"), None
    )
    return {
        "prefix_share": sum(s.prefix_len for s in served) / total,
        "beyond_share": beyond / total,
        "useful_share": worth / total,
        "saved_share": (sum(s.prefix_len for s in served) + worth) / total,
        "share_of_ceiling": 1.0 if beyond else None,
        "runs_mean": float(np.mean([len(one) for one in runs])),
        "edits_mean": 0.0,
        **nothing,
    }


def _stretches(mask: Bools, start: int) -> list[Run]:
    edges = np.flatnonzero(
        np.diff(np.concatenate([[False], mask[start:], [False]]).astype(np.int8))
    )
    return [Run(0, 0, start + a, b - a) for a, b in edges.reshape(-1, 2).tolist()]


def bench_files(args: argparse.Namespace, files: Sequence[_tokens.Requests]) -> dict[str, Any]:
    """``{file: {setting: {matcher: row}}}``."""
    out: dict[str, Any] = {}
    arms = {
        setting: [
            name
            for name in args.matchers
            if name in ARMS and (args.settings[setting].capacity or not ARMS[name].only_capped)
        ]
        for setting in args.settings
    }
    work = sum(f.num_tokens for f in files) * (1 + sum(map(len, arms.values())))
    with _bench.Progress(work, unit=" tokens") as bar:
        for requests in files:
            bar.say(requests.name)
            covered = _matchers.ceiling(requests.prompts, requests.spaces)
            alone = replay(requests, ARMS["prefix"], SETTINGS["unlimited"], distinct=0, bar=bar)
            distinct = alone.life.resident
            out[requests.name] = {}
            for name, setting in args.settings.items():
                rows = out[requests.name][name] = {}
                for matcher in arms[name]:
                    bar.say(f"{requests.name} {name} {matcher}")
                    arm = ARMS[matcher]
                    done = replay(requests, arm, setting, distinct=distinct, bar=bar)
                    rows[matcher] = row(done, covered, arm.make)
                if "ceiling" in args.matchers:
                    rows["ceiling"] = ceiling_row(alone.served, covered)
        bar.say("files replayed")
    return out


def bench_curve(files: Sequence[_tokens.Requests]) -> dict[str, Any]:
    """Useful share by chunk length: fixed lengths at any offset, and the tree's own runs."""
    out: dict[str, Any] = {}
    arms = {str(n): Arm(lambda n=n: _matchers.FixedAnyOffset(n)) for n in CURVE}  # type: ignore[misc]
    arms["kvshare"] = ARMS["kvshare"]
    with _bench.Progress(sum(f.num_tokens for f in files) * len(arms), unit=" tokens") as bar:
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


# ---- what is to be reached ---------------------------------------------------------------------

NAMED = ("rag_musique", "rag_qmsum", "fewshot_gsm8k", "ctx_longchat5", "agent_magagent_a")


class Verdict(NamedTuple):
    figure: str
    value: float
    target: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target


def verdicts(result: dict[str, Any]) -> Iterable[Verdict]:
    """The targets that this result can speak about."""
    files = result.get("files", {})

    def get(name: str, setting: str, matcher: str, figure: str = "useful_share") -> float | None:
        value = files.get(name, {}).get(setting, {}).get(matcher, {}).get(figure)
        return None if value is None else float(value)

    for name in NAMED:
        if (share := get(name, "unlimited", "kvshare", "share_of_ceiling")) is not None:
            yield Verdict(f"{name}: share of the ceiling", share, 0.995)
        ours = get(name, "unlimited", "kvshare")
        for other in ("winnow", "fixed-any-offset"):
            theirs = get(name, "unlimited", other)
            musique = name == "rag_musique"
            if ours is None or not theirs or (other != "winnow" and not musique):
                continue
            factor = 1.0 if not musique else 1.15 if other == "winnow" else 1.5
            yield Verdict(f"{name}: useful, times {other}'s", ours / theirs, factor)
    for setting in ("cap10", "cap30"):
        pairs = [(get(n, setting, "kvshare"), get(n, setting, "kvshare-lru")) for n in NAMED]
        if all(a is not None and b for a, b in pairs):
            ratio = np.mean([a for a, _ in pairs]) / np.mean([b for _, b in pairs])
            yield Verdict(f"{setting}: useful, times LRU's", float(ratio), 1.2)
    pairs = [(get(n, "depth1", "kvshare"), get(n, "unlimited", "kvshare")) for n in NAMED]
    if all(a is not None and b for a, b in pairs):
        ratio = np.mean([a for a, _ in pairs]) / np.mean([b for _, b in pairs])
        yield Verdict("depth 1: useful, of unlimited depth's", float(ratio), 0.9)
    claimed = get("chat_arena_hard", "unlimited", "kvshare", "beyond_share")
    if claimed is not None:
        yield Verdict("chat_arena_hard: claimed", claimed, 0.002, at_most=True)
    synthetic = result.get("synthetic", {}).get("twins", {})
    for edited, least in (("5%", 0.98), ("10%", 0.95), ("20%", 0.88)):
        if edited in synthetic:
            ours_row = synthetic[edited]["kvshare"]
            yield Verdict(f"twins {edited}: unedited found", ours_row["found"], least)
            yield Verdict(f"twins {edited}: runs per edit", ours_row["runs_per_edit"], 1.2, True)
    if "templates" in result.get("synthetic", {}):
        found = result["synthetic"]["templates"]["kvshare"]["found"]
        yield Verdict("templates: frame found", found, 0.95)
    scale = result.get("scale", {})
    if scale:
        for size, limit in (("8k", 2.0), ("32k", 10.0)):
            full = scale["full_match"][size]
            yield Verdict(f"full match {size}: p50 ms", full["ms_p50"], limit, True)
            tail = full["ms_p99"] / full["ms_p50"]
            yield Verdict(f"full match {size}: p99 over p50", tail, 3.0, True)
        for size, limit in (("8k", 0.7), ("100k", 8.0)):
            yield Verdict(
                f"nothing found {size}: p50 ms", scale["nothing"][size]["ms_p50"], limit, True
            )
        yield Verdict("insert per 8k: p50 ms", scale["insert_8k"]["ms_p50"], 1.0, True)
        yield Verdict("bytes per token, churned", scale["bytes_per_token"], 16.0, True)
        yield Verdict("lookup, times that at 100k", scale["lookup_ratio"], 1.5, True)


# ---- what is printed ----------------------------------------------------------------------------


_FIGURES = ("prefix", "beyond", "useful", "saved", "of ceiling", "runs", "edits", "p50 ms",
            "p99 ms", "ins/8k", "B/tok", "distinct")  # fmt: skip


def show(result: dict[str, Any]) -> str:
    parts = []
    for name, settings in result.get("files", {}).items():
        for setting, rows in settings.items():
            parts.append(
                _bench.table(
                    (f"{name} {setting}", *_FIGURES), [_cells(m, r) for m, r in rows.items()]
                )
            )
    for name, rows in result.get("curve", {}).items():
        cells = [
            (m, f"{r['beyond_share']:.1%}", f"{r['useful_share']:.1%}", _num(r["run_len_mean"], 0))
            for m, r in rows.items()
        ]
        parts.append(_bench.table((f"{name} chunks", "beyond", "useful", "run mean"), cells))
    if "synthetic" in result:
        parts.append(_match_synthetic.show(result["synthetic"]))
    if "scale" in result:
        parts.append(_match_scale.show(result["scale"]))
    found = list(verdicts(result))
    if found:
        cells = [
            (v.figure, f"{v.value:.3f}", f"{'<=' if v.at_most else '>='} {v.target:g}",
             "ok" if v.reached else "MISSED")
            for v in found
        ]  # fmt: skip
        parts.append(_bench.table(("to reach", "here", "target", ""), cells))
    return "\n\n".join(parts)


def _cells(matcher: str, r: dict[str, Any]) -> tuple[str, ...]:
    of_ceiling = r["share_of_ceiling"]
    return (
        matcher,
        *(f"{r[k]:.2%}" for k in ("prefix_share", "beyond_share", "useful_share", "saved_share")),
        "" if of_ceiling is None else f"{of_ceiling:.2%}",
        *(f"{r[k]:.1f}" for k in ("runs_mean", "edits_mean")),
        *(_num(r[k], 2) for k in ("lookup_ms_p50", "lookup_ms_p99")),
        _num(r.get("insert_ms_per_8k"), 2),
        _num(r["bytes_per_token"], 1),
        "" if "distinct_share" not in r else f"{r['distinct_share']:.0%}",
    )


def _num(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# ---- command line ------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--requests", type=Path, nargs="+", required=True, metavar="FILE",
        help="JSON lines with 'prompt', and 'extra_key' where there are namespaces")  # fmt: skip
    add("--tokenizer", type=Path, metavar="DIR",
        help="with a tokenizer.json (default: a BPE of 32k, trained on the files)")  # fmt: skip
    add("--capacity", type=float, metavar="SHARE",
        help="one setting in place of the five: a cache of this share of the file")  # fmt: skip
    add("--depth", type=int, metavar="D", help="one setting in place of the five: sources to D")
    add("--settings", nargs="+", choices=SETTINGS, default=STANDARD, metavar="NAME")
    add("--matchers", nargs="+", choices=[*ARMS, "ceiling"], default=[*ARMS, "ceiling"],
        metavar="NAME")  # fmt: skip
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    add("--limit", type=int, metavar="N", help="requests of each file, from the first")
    add("--json", type=Path, metavar="OUT", help="where the result goes")
    add("--plot", type=Path, metavar="OUT.png", help="where a page of plots goes")
    args = parser.parse_args()
    if args.capacity is None and args.depth is None:
        args.settings = {name: SETTINGS[name] for name in args.settings}
    else:
        name = "" if args.capacity is None else f"cap{100 * args.capacity:g}"
        name += "" if args.depth is None else f"depth{args.depth}"
        depth = ANY_DEPTH if args.depth is None else args.depth
        args.settings = {name: Setting(args.capacity, depth)}
    return args


def main() -> int:
    args = parse()
    _memory.start()
    _bench.warn_if_busy()
    env = _bench.environment(
        requests=[file.name for file in args.requests],
        tokenizer=args.tokenizer.name if args.tokenizer else f"bpe-{_tokens.VOCAB}, trained here",
        limit=args.limit,
    )
    try:
        files = _tokens.load(args.requests, tokenizer=args.tokenizer, limit=args.limit)
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"error: cannot read the requests: {error!r}") from None
    result: dict[str, Any] = {}
    if "files" in args.parts:
        result["files"] = bench_files(args, files)
    if "curve" in args.parts:
        result["curve"] = bench_curve(files)
    if "synthetic" in args.parts:
        result["synthetic"] = _match_synthetic.measure(files)
    if "scale" in args.parts:
        result["scale"] = _memory.in_clean_process(
            _match_scale.measure, [prompt for file in files for prompt in file.prompts]
        )
    result["env"] = env
    print(show(result))
    if args.json:
        _bench.write_json(args.json, result)
        print(f"numbers: {args.json}")
    if args.plot:
        import _match_plot

        _match_plot.draw(result, args.plot)
        print(f"plot: {args.plot}")
    wrong = sum(
        rows["kvshare"]["unequal_tokens"]
        for settings in result.get("files", {}).values()
        for rows in settings.values()
        if "kvshare" in rows
    )
    if wrong:
        print(f"FAILED: {wrong} mapped tokens are not equal in source and destination")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
