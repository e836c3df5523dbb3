"""Which servers run side by side, and one prompt in all of them.

``plain`` is SGLang with its default cache in its own best setting, ``allrows`` is our attention
with every row computed, ``kvshare`` reuses; ``window`` and ``trace`` reuse with that selection.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from kvshare_sglang.bench.models import Model
from kvshare_sglang.bench.server import Server, ServerSpec
from kvshare_sglang.bench.ttft.cases import Case
from kvshare_sglang.bench.ttft.work import Work, choice_of, work_of
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.mirror import Mirror

ARMS = ("plain", "allrows", "kvshare", "window", "trace")


class Setting(NamedTuple):
    """What may differ between servers of one model."""

    chunk: int
    threads: int


class Sample(NamedTuple):
    """One prompt in all arms, with the work of each that reuses."""

    prompt_tokens: int
    ttft_s: dict[str, float]
    work: dict[str, Work]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "work": {arm: w._asdict() for arm, w in self.work.items()}}


class Bench(NamedTuple):
    """What stays the same over a run."""

    model: Model
    config: KVShareConfig
    ours: Setting
    args: argparse.Namespace

    @property
    def vocab(self) -> int:
        return min(self.model.vocab_size, 4096)

    def config_of(self, arm: str, budget: float | None = None) -> KVShareConfig | None:
        """Of an arm that reuses, where its requests ask for a budget; None of the others."""
        if arm in ("plain", "twin", "allrows"):
            return None
        select = self.config.select if arm == "kvshare" else arm
        budget = self.config.budget if budget is None else budget
        return dataclasses.replace(self.config, select=select, budget=budget)


def server_spec(bench: Bench, name: str, setting: Setting) -> ServerSpec:
    args = bench.args
    flags: tuple[str, ...] = ()
    env: dict[str, str] = {}
    if name not in ("plain", "twin"):
        select = (bench.config_of(name) or bench.config).select
        flags = (
            "--kvshare",
            "--kvshare-budget",
            str(bench.config.budget),
            "--kvshare-select",
            select,
            # Of what follows random tokens no model is sure.
            "--kvshare-doubt",
            "0",
        )
    if name == "allrows":
        env = {"KVSHARE_MEASURE_ALL_ROWS": "1"}
    if args.dummy_weights:
        flags = (*flags, "--load-format", "dummy")
    return ServerSpec(
        name=name,
        model=bench.model.path,
        device=args.device,
        threads=setting.threads,
        chunk=setting.chunk,
        max_total_tokens=args.max_total_tokens,
        args=(*flags, *args.server_arg),
        env=env,
    )


def prime(servers: Sequence[Server], sources: Sequence[Tokens]) -> None:
    """Give all servers the same texts to cache, at the same time; nothing is timed."""

    def one(server: Server) -> None:
        server.flush()
        exact = None if server.spec.name in ("plain", "twin") else "exact"
        for tokens in sources:
            server.ask(tokens.tolist(), kvshare=exact)

    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(one, servers))


def measure(
    bench: Bench, servers: Sequence[Server], case: Case, *, turn: int, budget: float
) -> Sample:
    """One case in all arms; ``turn`` rotates their order."""
    prime(servers, case.sources)
    first = turn % len(servers)
    answers = {}
    for server in [*servers[first:], *servers[:first]]:
        arm = server.spec.name
        asked = {"budget": budget} if bench.config_of(arm) else None
        answers[arm] = server.ask(case.prompt.tolist(), kvshare=asked)
    mirror = Mirror()
    for tokens in case.sources:
        mirror.add(tokens)
    work = {}
    for server in servers:
        name = server.spec.name
        if config := bench.config_of(name, budget):
            choice = choice_of(mirror, case.prompt, config)
            work[name] = work_of(
                bench.model.config, choice, answers[name].kvshare, server.spec, config
            )
    ttft_s = {name: answer.ttft_s for name, answer in answers.items()}
    return Sample(len(case.prompt), ttft_s, work)
