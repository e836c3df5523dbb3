"""What became of each request of a load test, read from the records that aiperf wrote. Pure."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvshare_sglang.bench.common import KINDS, ScriptError
from kvshare_sglang.bench.load.trace import Timed


class Outcome(NamedTuple):
    """One request. Times in seconds after it was *due*, so a late client counts against nobody's
    favour; ``late_s`` is how late it was sent. ``tokens``: of the prompt, by kind; ``settled``:
    rows that ran beside these for a token in doubt."""

    number: int
    due_s: float
    late_s: float
    ttft_s: float
    total_s: float
    tokens: dict[str, int]
    new_tokens: int
    tenant: str | None = None
    declined: str | None = None
    error: str | None = None
    settled: int = 0

    @property
    def ok(self) -> bool:
        return self.error is None


def outcomes(records: Iterable[dict[str, Any]], trace: Sequence[Timed]) -> list[Outcome]:
    """One for each request of the trace, in its order. ``records``: aiperf's raw ones.

    The clock of the trace is set by the request that was sent least late. Raises ScriptError
    where a record is of no request of the trace, or none was made.
    """
    by_number = {}
    for record in records:
        rid = str(record.get("payload", {}).get("rid", ""))
        number = rid.removeprefix("load-")
        if number == rid or not number.isdigit() or int(number) >= len(trace):
            raise ScriptError(f"aiperf recorded a request that was not sent: {rid!r}")
        by_number[int(number)] = record
    if not by_number:
        raise ScriptError("aiperf recorded no request")
    begun = min(_sent_s(record) - trace[i].at_s for i, record in by_number.items())
    return [_outcome(i, one, by_number.get(i), begun) for i, one in enumerate(trace)]


def _sent_s(record: dict[str, Any]) -> float:
    return float(record["metadata"]["request_start_ns"]) / 1e9


def _outcome(number: int, request: Timed, record: dict[str, Any] | None, begun: float) -> Outcome:
    lost = Outcome(number, request.at_s, 0.0, 0.0, 0.0, {}, 0, request.tenant)
    if record is None:
        return lost._replace(error="no record")
    late = _sent_s(record) - begun - request.at_s
    first = last = usage = None
    for response in record.get("responses") or ():
        since = late + (response["perf_ns"] - record["start_perf_ns"]) / 1e9
        for packet in response.get("packets", ()):
            text = packet.get("value") if packet.get("name") == "data" else None
            if not text or not text.startswith("{"):
                continue
            event = json.loads(text)
            if "error" in event:
                return lost._replace(late_s=late, error=str(event["error"])[:200])
            if event.get("choices"):
                first, last = since if first is None else first, since
            usage = event.get("usage") or usage
    if first is None or last is None or usage is None:
        why = record.get("error") or f"status {record.get('status')}, no token or no usage"
        return lost._replace(late_s=late, error=str(why)[:200])
    told = (usage.get("kvshare") or [{}])[0]
    return Outcome(
        number, request.at_s, late, first, last, reuse(usage), int(usage["completion_tokens"]),
        request.tenant, told.get("declined"), settled=int(told.get("settled_tokens", 0)),
    )  # fmt: skip


def reuse(usage: dict[str, Any]) -> dict[str, int]:
    """Prompt tokens by kind, from ``usage`` of an answer.

    Of a server without the plug-in its prefix hit is known (``--enable-cache-report``).
    """
    if told := usage.get("kvshare"):
        return {kind: int(told[0][f"{kind}_tokens"]) for kind in KINDS}
    exact = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    kinds = dict.fromkeys(KINDS, 0)
    return {**kinds, "exact": exact, "fresh": int(usage["prompt_tokens"]) - exact}
