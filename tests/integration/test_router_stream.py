"""The stream of a real scheduler: what a router predicts from it is what the scheduler does."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Texts
from lab import Lab, computed, lab, request

from kvshare_sglang.policy.options import RequestOptions
from kvshare_sglang.router.cost import UNSAID
from kvshare_sglang.router.index import Index
from kvshare_sglang.router.stream import follow
from kvshare_sglang.runtime.shadow import SWITCH
from kvshare_sglang.runtime.stream import Load, load_of

TOKEN = "a token of the tests, long enough"
NONE = (None, None)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"ipc://{tmp_path_factory.mktemp('stream')}/worker"


@pytest.fixture(scope="module")
def worker(llama: Path, endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    token = tmp_path_factory.mktemp("token") / "file"
    token.write_text(TOKEN)
    # A pool so small that text is evicted, and chunks, so that prompts come in pieces.
    settings = {"max_total_tokens": 2000, "chunked_prefill_size": 512}
    stream = {"kvshare_stream": endpoint, "kvshare_stream_token_file": str(token)}
    with lab(llama, kvshare=True, **stream, **settings) as it:
        it.flush()  # the event loop has run: what it starts is there
        yield it


class Router:
    """An index that follows the worker, driven step by step."""

    def __init__(self, endpoint: str) -> None:
        self.index, self._endpoint = Index(1, secret=9), endpoint

    def until(
        self, done: Callable[[Index], bool], *, token: str = TOKEN, wait_s: float = 60
    ) -> bool:
        """Follow until something is seen; whether it was."""

        async def run() -> bool:
            task = asyncio.create_task(follow(self.index, 0, self._endpoint, token))
            end = time.monotonic() + wait_s
            while not done(self.index) and time.monotonic() < end:
                await asyncio.sleep(0.01)
            task.cancel()
            return done(self.index)

        return asyncio.run(run())

    def holds(self, tokens: int) -> bool:
        """Wait until the mirror holds as many tokens as the worker's tree."""

        def held(index: Index) -> bool:
            one = index.workers[0]
            return one.mirror is not None and bool(one.beat) and one.mirror.num_tokens == tokens

        return self.until(held)


def tokens_held(child: Any) -> int:
    return int(child.cache.fuzzy.num_tokens)


def runs_in_the_worker(child: Any, prompt: list[int], start: int) -> list[Any]:
    cache = child.cache
    space = cache.sync.space_of((None, None))
    found = cache.fuzzy.match(
        space,
        np.array(prompt, np.int32),
        start=start,
        max_depth=cache.config.source_depth,
        tolerance=cache.config.edit_tolerance,
    )
    return [run._replace(source=0) for run in found]


def test_predicted_rows_are_those_that_run_and_runs_those_that_are_found(
    worker: Lab, endpoint: str, texts: Texts
) -> None:
    """Through inserts, evictions and a flush; each prediction from a snapshot of its own, and with
    the changes since."""
    router, docs = Router(endpoint), [texts.passage(220) for _ in range(7)]
    reused = evicted = 0
    for turn in range(14):
        if turn == 9:
            worker.flush()
        chosen = texts.rng.sample(range(3 if turn > 9 else 7), 2)
        prompt = [*texts.passage(15), *docs[chosen[0]], *docs[chosen[1]], *texts.passage(25)]
        held = worker.ask("test_router_stream:tokens_held")
        assert router.holds(held)
        mirror = router.index.workers[0].mirror
        assert mirror is not None
        mirror.check()
        array = np.array(prompt, np.int32)
        prefix_len = mirror.prefix_len(NONE, array)
        ours = [run._replace(source=0) for run in mirror.match(NONE, array, start=prefix_len)]
        theirs = worker.ask("test_router_stream:runs_in_the_worker", prompt, prefix_len)
        assert [run[1:4] for run in ours] == [run[1:4] for run in theirs]
        work = router.index.choose(array, NONE, RequestOptions(), time.monotonic()).work
        record = worker.one(prompt, new=2)["kvshare"]
        assert work is not None
        assert (work.rows, work.copied, work.exact) == (
            computed(record),
            record["copied_tokens"],
            record["exact_tokens"],
        )
        reused += record["copied_tokens"]
        evicted += worker.ask("test_router_stream:tokens_held") < held
    assert reused > 1000
    assert evicted


def test_what_is_predicted_for_those_who_say_nothing_follows_the_switch(
    worker: Lab, endpoint: str, texts: Texts
) -> None:
    """``kvshare_reuse`` by hand, as a gate that closes."""
    router, doc = Router(endpoint), texts.passage(220)
    worker.one([*texts.passage(15), *doc], new=2)
    for on in (1, 0, 1):
        assert worker.ask("probes:switch", {SWITCH: on})
        # The next beat tells of it; what was told before is not waited for.
        default = "auto" if on else "exact"
        assert router.until(lambda index, now=default: default_of(index) == now)
        prompt = [*texts.passage(15), *doc, *texts.passage(25)]
        held = worker.ask("test_router_stream:tokens_held")
        assert router.holds(held)
        array = np.array(prompt, np.int32)
        work = router.index.choose(array, NONE, RequestOptions(UNSAID), time.monotonic()).work
        record = worker.one(prompt, new=2)["kvshare"]
        assert work is not None
        assert (work.rows, work.copied) == (computed(record), record["copied_tokens"])
        assert (work.copied > 0) == bool(on)


def default_of(index: Index) -> str | None:
    one = index.workers[0]
    return one.mirror.config.default if one.mirror and one.beat else None


def note_load(child: Any) -> None:
    child.noted = [*getattr(child, "noted", []), tuple(load_of(child.scheduler, child.cache))]


def noted_loads(child: Any) -> list[tuple[Any, ...]]:
    return list(child.noted)


def test_a_prompt_in_prefill_is_load_to_its_last_chunk(llama: Path, texts: Texts) -> None:
    """SGLang counts it neither as waiting nor, before its last chunk, as running."""
    call = ("call", "test_router_stream:note_load")
    with lab(llama, kvshare=True, chunked_prefill_size=256) as it:
        it.play([call, request("long", texts.passage(2000), new=2), *[call] * 6])
        idle, *loads = (Load(*each) for each in it.ask("test_router_stream:noted_loads"))
    assert (idle.running, idle.rows) == (0, 0)
    assert {each.running for each in loads[1:]} == {1}
    rows = [each.rows for each in loads[1:]]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > 1500 > rows[-1] > 0


def test_who_does_not_know_the_token_is_told_nothing(worker: Lab, endpoint: str) -> None:
    seen = lambda index: index.workers[0].mirror is not None  # noqa: E731
    for token in ("", "another token, as long as it is"):
        assert not Router(endpoint).until(seen, token=token, wait_s=1.5)
    assert Router(endpoint).until(seen)
