"""What a load test sends and when: prompts of one file at the arrival times of another. Pure."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvshare_sglang.bench.common import ScriptError


class Arrival(NamedTuple):
    """Seconds from the start of an arrival file, and how many tokens were answered then."""

    at_s: float
    new_tokens: int | None


class Timed(NamedTuple):
    """One request of a trace. ``at_s`` counts from the first; ``tenant`` is its namespace."""

    at_s: float
    prompt: str
    tenant: str | None
    new_tokens: int


class Prompt(NamedTuple):
    text: str
    tenant: str | None


def read_prompts(file: Path, *, limit: int | None = None) -> list[Prompt]:
    """The first ``limit`` lines with ``prompt``; ``extra_key`` names the tenant where it is.

    Raises ScriptError for a file that is none, naming the line.
    """
    found: list[Prompt] = []
    for number, line in _objects(file):
        if limit is not None and len(found) >= limit:
            break
        if not isinstance(line.get("prompt"), str):
            raise ScriptError(f"{file}, line {number}: no text under 'prompt'")
        tenant = line.get("extra_key")
        found.append(Prompt(line["prompt"], None if tenant is None else str(tenant)))
    if not found:
        raise ScriptError(f"{file} holds no request")
    return found


def read_arrivals(file: Path, *, limit: int) -> list[Arrival]:
    """The first ``limit`` lines with ``t`` (seconds, ascending); ``out``, if any, are the tokens
    that were answered. Raises ScriptError for a file that is none, naming the line."""
    found: list[Arrival] = []
    for number, line in _objects(file):
        if len(found) >= limit:
            break
        at, new = line.get("t"), line.get("out")
        if isinstance(at, bool) or not isinstance(at, int | float):
            raise ScriptError(f"{file}, line {number}: 't' must be seconds, got {at!r}")
        if found and at < found[-1].at_s:
            raise ScriptError(f"{file}, line {number}: t {at} is before t {found[-1].at_s}")
        found.append(Arrival(float(at), int(new) if isinstance(new, int) and new > 0 else None))
    return found


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ScriptError(f"{file}, line {number}: no JSON object")
                    yield number, value
    except (OSError, ValueError) as error:
        raise ScriptError(f"{file} is no file of JSON lines: {error}") from None


def mean_rate(times: Sequence[float]) -> float:
    """Requests per second from the first to the last; infinite where they come at once."""
    span = times[-1] - times[0]
    return (len(times) - 1) / span if span > 0 else float("inf")


def make(
    prompts: Sequence[Prompt], arrivals: Sequence[Arrival], *, most_new: int,
    speedup: float = 1.0, rate: float | None = None,
) -> list[Timed]:  # fmt: skip
    """Prompts at the times of as many arrivals, in order.

    ``rate``: times are scaled so that this many come per second on average; otherwise they are
    divided by ``speedup``. Each asks for as many tokens as were answered then, ``most_new`` at
    most, which is also what it asks for where that is not known. Raises ScriptError where there
    are fewer arrivals than prompts, or where arrivals at one time cannot be scaled to a rate.
    """
    if len(arrivals) < len(prompts):
        raise ScriptError(
            f"{len(prompts)} requests need as many arrivals, the file has {len(arrivals)}: "
            "lower --limit"
        )
    used = arrivals[: len(prompts)]
    times = [one.at_s - used[0].at_s for one in used]
    if rate is not None and len(times) > 1:
        if times[-1] == 0:
            raise ScriptError("all arrivals have the same time: no rate can be made of them")
        speedup = rate / mean_rate(times)
    return [
        Timed(
            at / speedup,
            prompt.text,
            prompt.tenant,
            min(one.new_tokens or most_new, most_new),
        )
        for at, prompt, one in zip(times, prompts, used, strict=True)
    ]


def body(request: Timed, number: int) -> dict[str, Any]:
    """What is posted to ``/v1/completions``. The answer's id is the number, so that it is known
    again."""
    tenant = {} if request.tenant is None else {"extra_key": request.tenant}
    return {
        "model": "default",
        "prompt": request.prompt,
        "rid": f"load-{number}",
        "max_tokens": request.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **tenant,
    }


def schedule_lines(trace: Sequence[Timed]) -> Iterator[str]:
    """The trace in the form that aiperf sends verbatim: a body and milliseconds on each line."""
    for number, request in enumerate(trace):
        line = {"timestamp": request.at_s * 1e3, "payload": body(request, number)}
        yield json.dumps(line) + "\n"
