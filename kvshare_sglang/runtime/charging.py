"""What SGLang's admission charges a request that reuses: the rows that run, not all its tokens.

Its budgets bound the rows of a batch, so that activations fit. They are raised for the length of
one admission by the tokens that will be copied; memory for KV stays charged in full. Whole, or as
before: where the rows do not fit the chunk, nothing is raised; where they only do not fit what
the batch has left of it, the request waits for the next one rather than be cut.

A batch that must run every row after all (a copy failed) runs them in parts (``slices.py``). One
with inputs or outputs by token could not, so none such is ever raised.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from kvshare_sglang.policy.admit import goes_whole
from kvshare_sglang.policy.select.base import Sees
from kvshare_sglang.runtime import support, versions
from kvshare_sglang.runtime.request import RequestReuse

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder


class Cost(NamedTuple):
    """Of one request, in whole pages: what SGLang charges, and the rows that run at most."""

    tokens: int
    rows: int


def must_wait(adder: "PrefillAdder", req: "Req", state: RequestReuse) -> bool:
    """Whether a request is for the next batch: it needs every row of one that holds more tokens
    than SGLang would let in, or only its neighbours keep it from coming whole."""
    if _raised(adder) and support.is_by_token(req):
        return True
    cost, chunk = _cost(adder, state), versions.chunk_size()
    if cost is None or chunk is None or not adder.can_run_list:
        return False
    is_cut = cost.tokens > adder.rem_chunk_tokens and not _saved(adder, state)
    return is_cut and goes_whole(*cost, room=chunk, chunk=chunk)


@contextmanager
def by_rows(adder: "PrefillAdder", req: "Req", state: RequestReuse) -> Iterator[None]:
    """Inside, SGLang admits ``req`` for the rows that it runs at most. After it, the budgets are
    less by these, in pages; where it was not let in, or only a part of it, by what SGLang took."""
    saved = _saved(adder, state)
    before = len(adder.can_run_list)
    _raise(adder, saved)
    yield
    if len(adder.can_run_list) > before and not versions.was_cut(adder, req):
        adder.kvshare = _raised(adder) + saved
    else:
        _raise(adder, -saved)


def _cost(adder: "PrefillAdder", state: RequestReuse) -> Cost | None:
    """None where all of a request is charged as ever."""
    plan, selector = state.plan, state.selector
    if plan is None or selector is None or adder.rem_chunk_tokens is None:
        return None
    if selector.sees is Sees.SCORES:  # up to its check layer every row runs
        return None
    page = 1 if getattr(adder, "exact_chunk_fill", False) else adder.page_size
    tokens = plan.prompt_len - plan.prefix_len
    # Rows of the prefix hit that run again are few beside its text, and no one's budget.
    most = min(selector.most_rows(plan, budget=state.budget), tokens)
    return Cost(_in_pages(tokens, page), _in_pages(most, page))


def _saved(adder: "PrefillAdder", state: RequestReuse) -> int:
    """Tokens of the request that SGLang would charge and that do not run; 0 where all that it has
    is charged."""
    cost, room, chunk = _cost(adder, state), adder.rem_chunk_tokens, versions.chunk_size()
    if cost is None or room is None or chunk is None or not _may_raise(adder):
        return 0
    held = chunk - room + _raised(adder)
    return cost.tokens - cost.rows if goes_whole(*cost, room=room, chunk=chunk, held=held) else 0


def _may_raise(adder: "PrefillAdder") -> bool:
    """Whether no request of the batch needs every row of it, nor one that will decode in it."""
    if _raised(adder):
        return True  # then it was asked, and ``must_wait`` has kept such requests out
    others = list(adder.can_run_list)
    if versions.mixes_decodes() and adder.running_batch is not None:
        others += adder.running_batch.reqs
    return not any(support.is_by_token(other) for other in others)


def _raise(adder: "PrefillAdder", tokens: int) -> None:
    adder.rem_input_tokens += tokens
    if tokens:
        assert adder.rem_chunk_tokens is not None
        adder.rem_chunk_tokens += tokens


def _raised(adder: "PrefillAdder") -> int:
    """Tokens that the batch so far holds and that nobody is charged for."""
    return int(getattr(adder, "kvshare", 0))


def _in_pages(tokens: int, page: int) -> int:
    return -(-tokens // page) * page
