"""Plan a request's reuse and lock its sources as SGLang admits it to prefill."""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.plan import Run
from kvshare_sglang.policy.admit import Decline, may_reuse, pays
from kvshare_sglang.policy.options import parse_options
from kvshare_sglang.policy.select.base import Sees, Selector
from kvshare_sglang.runtime import support, versions
from kvshare_sglang.runtime.cache.index_sync import as_tokens
from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache
from kvshare_sglang.runtime.report import Fallback
from kvshare_sglang.runtime.request import OncePerAnswer, RequestReuse, Stage

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder

logger = logging.getLogger(__name__)


def hook_verify(result: Any, params: Any, *args: Any, **kw: Any) -> None:
    """AFTER ``SamplingParams.verify``: bad request options are a 400, like SGLang's own."""
    parse_options(params.custom_params)


def hook_validate_input_length(error: str | None, req: "Req", *args: Any, **kw: Any) -> str | None:
    """AFTER ``scheduler.validate_input_length``, which every request passes whatever door it came
    through: a prompt of no tokens ends SGLang 0.5.22 and later; with us it is a 400."""
    if error is None and not len(req.origin_input_ids):
        return "the prompt has 0 tokens, at least 1 is needed"
    return error


def hook_add_one_req(
    original: Callable[..., Any], adder: "PrefillAdder", req: "Req", *args: Any, **kw: Any
) -> Any:
    """AROUND ``PrefillAdder.add_one_req``.

    The sources are locked before SGLang counts what it may evict, so that what it admits fits.
    Where a request does not fit with its sources locked, it is tried again without reuse.
    """
    cache = adder.tree_cache
    if not isinstance(cache, FuzzyRadixCache):
        return original(adder, req, *args, **kw)
    state = plan_request(cache, req)
    if state.plan is not None:
        try:
            cache.sources.lock(state)
        except Exception:
            logger.exception("KVShare could not lock the sources of request %s", req.rid)
            cache.sources.unlock(state)
            state = RequestReuse(cache.report, decline=Decline.FAULT)
    result = original(adder, req, *args, **kw)
    if state.plan is not None and not _admitted(adder, req):
        cache.sources.unlock(state)
        without = RequestReuse(cache.report, decline=Decline.NO_ROOM)
        result = original(adder, req, *args, **kw)
        state = without if _admitted(adder, req) else state
    if _admitted(adder, req):
        if state.plan is not None and versions.was_cut(adder, req):
            try:
                state = _for_chunks(cache, state)
            except Exception:
                logger.exception("KVShare could not plan request %s in chunks", req.rid)
                cache.sources.unlock(state)
                state = RequestReuse(cache.report, decline=Decline.FAULT)
        _attach(cache, req, state)
    else:
        req.kvshare = state
    return result


def plan_request(cache: FuzzyRadixCache, req: "Req") -> RequestReuse:
    """What the request should reuse, or why nothing. A waiting request is looked up again only
    after its namespace or its prefix hit has changed."""
    prefix_len = versions.prefix_len(req)
    stamp = cache.fuzzy.stamp(versions.namespace(req))
    based_on = stamp, prefix_len, len(req.full_untruncated_fill_ids)
    known: RequestReuse | None = getattr(req, "kvshare", None)
    if known is not None and known.stage is Stage.PLANNED and known.based_on == based_on:
        return known
    cache.release(req)
    state = RequestReuse(cache.report, based_on=based_on)
    try:
        options = parse_options(req.sampling_params.custom_params, default=cache.config.default)
    except ConfigError as error:  # whatever process took the request let it pass
        logger.warning("KVShare: request %s reuses nothing: %s", req.rid, error)
        state.decline = Decline.BAD_OPTIONS
        return state
    state.decline = may_reuse(support.view_of(req, options.mode))
    if state.decline is not None:
        return state
    state.budget = cache.config.budget if options.budget is None else options.budget
    started = time.perf_counter()
    try:
        _plan(cache, req, prefix_len, state)
    except Exception:
        # Reuse must never fail a request; the fault is logged and counted, not hidden.
        logger.exception("KVShare lookup failed for request %s", req.rid)
        state.plan, state.decline = None, Decline.FAULT
    cache.report.looked_up(time.perf_counter() - started)
    return state


def find_runs(cache: FuzzyRadixCache, req: "Req", prefix_len: int) -> tuple[Run, ...]:
    """Cached text in the request's prompt after its prefix hit."""
    return cache.fuzzy.match(
        versions.namespace(req),
        as_tokens(req.full_untruncated_fill_ids),
        start=prefix_len,
        max_depth=cache.config.source_depth,
        tolerance=cache.config.edit_tolerance,
    )


def _plan(cache: FuzzyRadixCache, req: "Req", prefix_len: int, state: RequestReuse) -> None:
    """Fill in the plan of the selector asked for, or the reason why there is none."""
    runs = find_runs(cache, req, prefix_len)
    choosing = cache.choosing
    state.asked = choosing.asked.name
    state.selector = choosing.asked if choosing.unserved is None else choosing.structural
    state.fallback = choosing.unserved
    _plan_with(cache, state, state.selector, runs, len(req.full_untruncated_fill_ids), prefix_len)


def _plan_with(
    cache: FuzzyRadixCache,
    state: RequestReuse,
    selector: Selector,
    runs: tuple[Run, ...],
    prompt_len: int,
    prefix_len: int,
) -> None:
    plan = selector.plan(runs, prompt_len=prompt_len, prefix_len=prefix_len, budget=state.budget)
    rows = selector.most_rows(plan, budget=state.budget)
    state.decline = pays(plan, cache.config, rows=rows, found=bool(runs))
    state.plan = plan if state.decline is None else None


def _for_chunks(cache: FuzzyRadixCache, state: RequestReuse) -> RequestReuse:
    """SGLang gives the request only a part of its prompt: a selector that must see the whole of
    it cannot choose, and the structural one does. Whether that pays is asked again."""
    assert state.plan is not None
    assert state.selector is not None
    if state.selector.sees is Sees.NOTHING:
        return state
    whole, structural = state.plan, cache.choosing.structural
    instead = RequestReuse(cache.report, budget=state.budget)
    _plan_with(cache, instead, structural, whole.runs, whole.prompt_len, whole.prefix_len)
    # Nothing is evicted in between: the sources of the new plan are some of those of the old.
    cache.sources.unlock(state)
    if instead.plan is None:
        return instead
    state.use(structural, instead.plan, Fallback.CHUNKED)
    cache.sources.lock(state)
    return state


def _admitted(adder: "PrefillAdder", req: "Req") -> bool:
    return bool(adder.can_run_list) and adder.can_run_list[-1] is req


def _attach(cache: FuzzyRadixCache, req: "Req", state: RequestReuse) -> None:
    """The request goes to prefill: remember, report and count its reuse."""
    req.kvshare = state
    if state.plan is not None:
        cache.sources.note_use(state)
    exact = versions.prefix_len(req)
    if exact:
        cache.usage.touch_path(req.last_node, cache.root_node)
    state.admit(exact=exact)
    column = OncePerAnswer(state.record, req)
    req.customized_info = {**(req.customized_info or {}), "kvshare": column}
