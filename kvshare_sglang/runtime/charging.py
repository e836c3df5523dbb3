"""What SGLang's admission charges a request that reuses: the rows that run, not all its tokens.

Its budgets bound the rows of a batch, so that activations fit. They are raised for the length of
one admission by the tokens that will be copied; memory for KV stays charged in full. Whole, or as
before: where a request's rows do not fit what is left of the chunk, nothing is raised. A batch
that must run every row of every request after all (a copy failed) runs them in parts
(``slices.py``); one with inputs or outputs by token could not, so none is ever raised.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvshare_sglang.policy.admit import goes_whole
from kvshare_sglang.policy.select.base import Sees
from kvshare_sglang.runtime import support, versions
from kvshare_sglang.runtime.request import RequestReuse

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder


def must_wait(adder: "PrefillAdder", req: "Req") -> bool:
    """Whether a request must not share the batch so far: it needs every row of a batch that holds
    more tokens than SGLang would let in. It is the first of the next batch."""
    return _raised(adder) > 0 and support.is_by_token(req)


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


def _saved(adder: "PrefillAdder", state: RequestReuse) -> int:
    """Tokens of the request that SGLang would charge and that do not run; 0 where all that it has
    is charged."""
    plan, selector, room = state.plan, state.selector, adder.rem_chunk_tokens
    if plan is None or selector is None or selector.sees is Sees.SCORES:  # dhd runs all, at first
        return 0
    chunk = versions.chunk_size()
    if chunk is None or room is None or not _may_raise(adder):
        return 0
    page = 1 if getattr(adder, "exact_chunk_fill", False) else adder.page_size
    tokens = _in_pages(plan.prompt_len - plan.prefix_len, page)
    rows = _in_pages(selector.most_rows(plan, budget=state.budget), page)
    held = chunk - room + _raised(adder)
    return tokens - rows if goes_whole(tokens, rows=rows, room=room, chunk=chunk, held=held) else 0


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
