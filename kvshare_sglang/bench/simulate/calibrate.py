"""Step costs of a real server, measured from outside and fitted by least squares.

Each sample is a time and what was done in it: prefill steps, rows, what these attend to, copied
tokens, requests. Prompts ask for one token, so that nothing but prefill is in it; decode steps are
measured apart.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench import common
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.server import Answer, Server
from kvshare_sglang.sim.serving import StepCosts

LENGTHS = (32, 128, 384, 768, 1280, 1792)
BURSTS = (2, 4, 8, 16)  # one size alone cannot tell a step, a request and the overhead apart
SHORT = 96  # tokens of each prompt of a burst
DECODED = 24


class Sample(NamedTuple):
    """What was done in ``seconds``."""

    seconds: float
    steps: int
    rows: int
    pairs: float
    copied: int
    requests: int


def measure(
    server: Server, *, vocab: int, chunk: int, most: int, reuse: bool, repeats: int
) -> list[Sample]:
    """Prompts alone, new and (with ``reuse``) moved, then several at once: a sample for each, of
    ``repeats`` the one with the median time. ``most``: requests that the server runs together."""
    rng = np.random.default_rng(0)
    lengths = [n for n in LENGTHS if n <= chunk]
    found: list[list[Sample]] = []

    def text(length: int) -> list[int]:
        ids: list[int] = rng.integers(5, vocab, length).tolist()
        return ids

    # The first requests of a server are slower than all others.
    for length in (64, *lengths[-2:]):
        server.ask(text(length))
    with common.Progress(repeats * (len(lengths) * (1 + reuse) + len(BURSTS)), unit="") as bar:
        bar.say(f"step costs of {server.spec.name}")
        for _ in range(repeats):
            samples: list[Sample] = []
            found.append(samples)
            for length in lengths:
                server.flush()
                ids = text(length)
                samples.append(_sample([server.ask(ids)], [length], reuse=reuse))
                bar.update()
                if reuse:
                    moved = text(40) + ids + text(8)
                    samples.append(_sample([server.ask(moved)], [len(moved)], reuse=True))
                    bar.update()
            for burst in BURSTS:
                server.flush()
                many = [text(SHORT) for _ in range(burst)]
                with ThreadPoolExecutor(burst) as pool:
                    answers = list(pool.map(server.ask, many))
                steps = steps_of(burst, most=min(most, max(chunk // SHORT, 1)))
                samples.append(_sample(answers, [SHORT] * burst, reuse=reuse, steps=steps))
                bar.update()
    return [sorted(alike)[(len(alike) - 1) // 2] for alike in zip(*found, strict=True)]


def steps_of(burst: int, *, most: int) -> int:
    """Prefill steps of requests that come at once: the first to come is served alone, the others
    wait meanwhile and go together, ``most`` in a step.

    >>> [steps_of(n, most=8) for n in (1, 2, 9, 10, 16)]
    [1, 2, 2, 3, 3]
    """
    return 1 + -(-(burst - 1) // most)


def _sample(
    answers: Sequence[Answer], lengths: Sequence[int], *, reuse: bool, steps: int = 1
) -> Sample:
    copies = [one.kvshare["copied_tokens"] if reuse else 0 for one in answers]
    rows = [length - copied for length, copied in zip(lengths, copies, strict=True)]
    pairs = sum(run * (length - run / 2) for length, run in zip(lengths, rows, strict=True))
    took = max(one.ttft_s for one in answers)
    return Sample(took, steps, sum(rows), pairs, sum(copies), len(answers))


def measure_decode(
    server: Server, *, vocab: int, batch: int, late: bool = False
) -> dict[int, float]:
    """Seconds of a decode step by how many requests decode: one, and ``batch``. ``late``: a first
    token is read after the first of these steps."""
    rng = np.random.default_rng(1)
    found = {}
    for together in (1, batch):
        server.flush()
        prompts = [rng.integers(5, vocab, 24).tolist() for _ in range(together)]
        with ThreadPoolExecutor(together) as pool:
            answers = list(pool.map(lambda ids: server.ask(ids, max_new_tokens=DECODED), prompts))
        each = [(one.total_s - one.ttft_s) / (DECODED - 1 - late) for one in answers]
        found[together] = common.median(each)
    return found


def fit(samples: Sequence[Sample], decode: dict[int, float]) -> tuple[StepCosts, float]:
    """The costs that explain samples best, none below 0, errors relative to what was measured; and
    the median relative error that is left. Raises ScriptError for too few samples.

    What a request takes outside its steps is in each sample once. Samples ask for one token, and no
    step follows them, so nothing of them was read late.
    """
    if len(samples) < 7:
        raise ScriptError(f"step costs need at least 7 samples, got {len(samples)}")
    seconds = np.array([one.seconds for one in samples])
    done = np.array([[1.0, *one[1:]] for one in samples])
    factors = _not_negative(done / seconds[:, None], np.ones(len(samples)))
    left = np.abs(done @ np.array(factors) / seconds - 1)
    overhead, step, row, pair, copy, request = factors
    few, many = min(decode), max(decode)
    each = max((decode[many] - decode[few]) / (many - few), 0.0) if many > few else 0.0
    costs = StepCosts(
        step=step, row=row, pair=pair, copy=copy, request=request, overhead=overhead,
        decode_step=max(decode[few] - each * few, 0.0), decode_request=each,
    )  # fmt: skip
    return costs, float(np.median(left))


def _not_negative(a: Any, b: Any) -> list[float]:
    """Least squares without negative factors: those that would be are left out, the most negative
    first (backward elimination; exact where the solution without the bound is not negative)."""
    free = list(range(a.shape[1]))
    out = [0.0] * a.shape[1]
    while free:
        found = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        worst = int(np.argmin(found))
        if found[worst] >= 0:
            for i, value in zip(free, found, strict=True):
                out[i] = float(value)
            return out
        del free[worst]
    return out
