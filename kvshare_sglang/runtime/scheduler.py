"""Plan a request's reuse and lock its sources as SGLang admits it to prefill."""

import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import ConfigError
from kvshare_sglang.plan import ReusePlan, Run
from kvshare_sglang.policy import sampling
from kvshare_sglang.policy.admit import Decline, may_reuse, pays
from kvshare_sglang.policy.options import parse_options
from kvshare_sglang.policy.select.base import Sees, Selector, repair_rows
from kvshare_sglang.runtime import charging, support, versions
from kvshare_sglang.runtime.cache.index_sync import as_tokens
from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache
from kvshare_sglang.runtime.report import Fallback
from kvshare_sglang.runtime.request import OncePerAnswer, RequestReuse, Stage, told, was_settled
from kvshare_sglang.runtime.shadow import Shadow

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder

logger = logging.getLogger(__name__)


def hook_verify(result: Any, params: Any, *args: Any, **kw: Any) -> None:
    """AFTER ``SamplingParams.verify``: bad request options are a 400, like SGLang's own, and so is
    what would end the process that samples, or the one that writes the answer."""
    parse_options(params.custom_params)
    sampling.check(params)


def hook_validate_input_length(error: str | None, req: "Req", *args: Any, **kw: Any) -> str | None:
    """AFTER ``scheduler.validate_input_length``, which every request passes whatever door it came
    through: what ends SGLang there is a 400 with us."""
    return _unserved(req) if error is None else error


def _unserved(req: "Req") -> str | None:
    """Why a request would end the process: no tokens (SGLang 0.5.22 and later), or tokens,
    alternatives or positions that are not there, or parameters that nothing can be sampled by,
    which are taken out: what is refused still runs a token."""
    prompt, vocab = np.asarray(req.origin_input_ids, np.int64), req.vocab_size
    if not len(prompt):
        return "the prompt has 0 tokens, at least 1 is needed"
    if vocab is not None and req.multimodal_inputs is None:
        for token in (int(prompt.min()), int(prompt.max())):
            if not 0 <= token < vocab:
                return f"input_ids must be in [0, {vocab}), the vocabulary, got {token}"
    asked = req.logprob
    if asked is not None and vocab is not None:
        num = asked.top_logprobs_num or 0
        if not 0 <= num <= vocab:
            return f"top_logprobs_num must be in [0, {vocab}], got {num}"
    params = req.sampling_params
    try:
        sampling.check(params)
        if vocab is not None and params.min_new_tokens:  # until then SGLang keeps from stopping
            for token in params.stop_token_ids or ():
                if not 0 <= token < vocab:
                    allowed = f"in [0, {vocab}), the vocabulary"
                    raise ConfigError("stop_token_ids", token, allowed)
    except ConfigError as error:
        sampling.reset(params)
        return str(error)
    for at in getattr(req, "token_indices_to_pool", None) or ():
        if not 0 <= at < len(prompt):
            return f"token_indices_to_pool must be in [0, {len(prompt)}), the prompt, got {at}"
    return None


def hook_add_request_to_queue(
    original: Callable[..., Any], scheduler: Any, req: "Req", *args: Any, **kw: Any
) -> Any:
    """AROUND ``Scheduler._add_request_to_queue``, where it is known from which position on
    log-probabilities were asked: SGLang refuses one behind the prompt, and ends in the batch of one
    before it. Its front ends in Python never send that (``doors.py``), the one in Rust does."""
    if (start := req.logprob_start_len) < -1:
        req.logprob_start_len = -1
        req.set_finish_with_abort(str(ConfigError("logprob_start_len", start, "-1 or more")))
    return original(scheduler, req, *args, **kw)


def hook_calc_priority(
    original: Callable[..., Any], policy: Any, waiting_queue: list["Req"], *args: Any, **kw: Any
) -> None:
    """AROUND ``SchedulePolicy.calc_priority``, which orders the queue in place, before each batch.
    SGLang's own work is done first; with ``--schedule-policy kvshare`` it leaves the order alone.
    """
    original(policy, waiting_queue, *args, **kw)
    cache = policy.tree_cache
    if isinstance(cache, FuzzyRadixCache) and cache.queue is not None:
        cache.queue.sort(waiting_queue, functools.partial(plan_request, cache))


def hook_new_weights(original: Callable[..., Any], updater: Any, *args: Any, **kw: Any) -> Any:
    """AROUND ``flush_cache_after_weight_update``, which all that loads weights calls once it has,
    whether it was told to flush or not, and whether that fails or not."""
    _new_weights(updater)
    return original(updater, *args, **kw)


def hook_end_weight_update(
    original: Callable[..., Any], updater: Any, *args: Any, **kw: Any
) -> Any:
    """AROUND ``end_weight_update`` (0.5.21 and later): in a session that ends, others may have
    written weights to memory (RDMA), and that calls nothing else; nor does a load that failed."""
    if versions.is_updating_weights(updater):
        _new_weights(updater)
    return original(updater, *args, **kw)


def _new_weights(updater: Any) -> None:
    cache = updater.flush_cache.__self__.tree_cache
    if isinstance(cache, FuzzyRadixCache):
        cache.new_weights()


def accepts_blended(config: KVShareConfig, shadow: Shadow, req: "Req") -> bool:
    """Whether a prefix hit of the request may be KV that is not exact: reuse is served for it, and
    it does not ask for all of what is reused to be computed again."""
    try:
        options = parse_options(req.sampling_params.custom_params, default=shadow.default)
    except ConfigError:
        return False
    if was_settled(req):
        return False
    budget = config.budget if options.budget is None else options.budget
    return budget < 1 and may_reuse(support.view_of(req, options.mode)) is None


def hook_add_one_req(
    original: Callable[..., Any], adder: "PrefillAdder", req: "Req", *args: Any, **kw: Any
) -> Any:
    """AROUND ``PrefillAdder.add_one_req``. Where nothing runs that would free memory by ending,
    finished turns are given back until the request fits.
    """
    cache = adder.tree_cache
    if not isinstance(cache, FuzzyRadixCache):
        return original(adder, req, *args, **kw)
    if cache.pins is None:
        return _add_one_req(original, cache, adder, req, *args, **kw)
    cache.pins.expire()
    result = _add_one_req(original, cache, adder, req, *args, **kw)
    while (
        _runs_nothing(adder)
        and result == versions.no_memory()
        and cache.pins.give_back(_short_of(adder, req))
    ):
        result = _add_one_req(original, cache, adder, req, *args, **kw)
    if result == versions.no_memory() and cache.pins.tokens:
        # SGLang would not ask again before a request ends, and pins may end first.
        return versions.full_batch()
    return result


def _short_of(adder: "PrefillAdder", req: "Req") -> int:
    """Tokens that the prompt alone lacks, at least 1: what its answer needs, SGLang says."""
    return max(1, _not_cached(req) - int(adder.rem_total_tokens))


def _not_cached(req: "Req") -> int:
    """Tokens of its prompt behind its prefix hit."""
    return len(req.full_untruncated_fill_ids) - versions.prefix_len(req)


def _runs_nothing(adder: "PrefillAdder") -> bool:
    """Whether no request would free memory by ending."""
    return not adder.can_run_list and (
        adder.running_batch is None or adder.running_batch.is_empty()
    )


def _add_one_req(
    original: Callable[..., Any],
    cache: FuzzyRadixCache,
    adder: "PrefillAdder",
    req: "Req",
    *args: Any,
    **kw: Any,
) -> Any:
    """The sources are locked before SGLang counts what it may evict, so that what it admits fits.
    Where a request does not fit with its sources locked, it is tried again without reuse."""
    state = plan_request(cache, req)
    if charging.must_wait(adder, req, state) or _is_for_later(cache, adder, req, state):
        req.kvshare = state
        return versions.full_batch()
    holds = state.chooses
    if holds:
        state = _hold(cache, req, state)
        holds = _holds(state)
    with charging.by_rows(adder, req, state):
        result = original(adder, req, *args, **kw)
    if holds and not _admitted(adder, req):
        cache.let_go(req, state)
        without = _without(cache, state, Decline.NO_ROOM)
        if not _is_for_later(cache, adder, req, without):
            result = original(adder, req, *args, **kw)
        state = without if _admitted(adder, req) else state
    if _admitted(adder, req):
        if state.plan is not None and state.plan.runs and versions.was_cut(adder, req):
            try:
                state = _for_chunks(cache, req, state)
            except Exception:
                logger.exception("KVShare could not plan request %s in chunks", req.rid)
                cache.let_go(req, state)
                state = _without(cache, state, Decline.FAULT)
        _attach(cache, adder, req, state)
    else:
        req.kvshare = state
    return result


def _hold(cache: FuzzyRadixCache, req: "Req", state: RequestReuse) -> RequestReuse:
    """Lock the sources of a request, and set aside what its repair may need; where that fails, the
    request without reuse."""
    try:
        cache.sources.lock(state)
        cache.retainer.reserve(req, state, num=_most_repaired(state, cache.page_size))
    except Exception:
        logger.exception("KVShare could not lock the sources of request %s", req.rid)
        cache.let_go(req, state)
        return _without(cache, state, Decline.FAULT)
    return state


def _holds(state: RequestReuse) -> bool:
    """Whether sources or spare slots are held: nothing is after a fault."""
    return state.chooses and state.decline is not Decline.FAULT


def _is_for_later(
    cache: FuzzyRadixCache, adder: "PrefillAdder", req: "Req", state: RequestReuse
) -> bool:
    queue = cache.queue
    return queue is not None and queue.must_wait(req, state, alone=_runs_nothing(adder))


def _without(cache: FuzzyRadixCache, state: RequestReuse, reason: Decline) -> RequestReuse:
    """The request copies nothing; a prefix hit that is not exact stays what it is."""
    assert state.plan is not None
    instead = _instead_of(state, cache)
    if state.plan.blend:
        instead.plan = state.plan.nothing()
    # Without runs nothing of the plan is lost but a repair.
    instead.decline = reason if state.plan.runs or reason is Decline.FAULT else None
    return instead


def _instead_of(state: RequestReuse, cache: FuzzyRadixCache) -> RequestReuse:
    """What the request asked for, without a plan."""
    return RequestReuse(
        cache.report, budget=state.budget, doubt=state.doubt, doubt_shift=state.doubt_shift,
        weights=state.weights,
    )  # fmt: skip


def _most_repaired(state: RequestReuse, page: int) -> int:
    """How many rows of the prefix hit the selector may run again; none for the last page of a
    prompt that was there before."""
    plan = state.plan
    assert plan is not None
    assert state.selector is not None
    if state.selector.sees is not Sees.ATTENTION or 1 < page >= plan.prompt_len - plan.prefix_len:
        return 0
    return repair_rows(plan, budget=state.budget)


def plan_request(cache: FuzzyRadixCache, req: "Req") -> RequestReuse:
    """What the request should reuse, or why nothing. A waiting request is looked up again only
    after its namespace or its prefix hit has changed."""
    prefix_len = versions.prefix_len(req)
    stamp = cache.fuzzy.stamp(cache.sync.space_of(versions.namespace(req)))
    based_on = (
        stamp,
        cache.sync.weights,
        cache.shadow.default,
        prefix_len,
        req.last_node,
        len(req.full_untruncated_fill_ids),
    )
    known: RequestReuse | None = getattr(req, "kvshare", None)
    if known is not None and known.stage is Stage.PLANNED and known.based_on == based_on:
        return known
    cache.release(req)
    state = RequestReuse(cache.report, based_on=based_on, weights=cache.sync.weights)
    of_an_adapter = _of_an_adapter(cache, req)
    try:
        options = parse_options(req.sampling_params.custom_params, default=cache.shadow.default)
    except ConfigError as error:  # whatever process took the request let it pass
        logger.warning("KVShare: request %s reuses nothing: %s", req.rid, error)
        state.decline = Decline.BAD_OPTIONS
        return state
    settled = was_settled(req)
    state.decline = of_an_adapter or may_reuse(
        support.view_of(req, "exact" if settled else options.mode)
    )
    if state.decline is Decline.EXACT_REQUESTED and not settled and _says_nothing(req):
        of_server = cache.config.default == "exact"
        state.decline = Decline.DEFAULT_EXACT if of_server else Decline.SHADOW
    if state.decline is not None:
        state.plan = _only_hit(cache, req, prefix_len)  # None, or what it hit is not exact
        return state
    state.budget = cache.config.budget if options.budget is None else options.budget
    state.doubt = cache.config.doubt if options.doubt is None else options.doubt
    state.doubt_shift = cache.config.doubt_shift if options.doubt is None else 0.0
    started = time.perf_counter()
    try:
        _plan(cache, req, prefix_len, state)
    except Exception:
        # Reuse must never fail a request; the fault is logged and counted, not hidden.
        logger.exception("KVShare lookup failed for request %s", req.rid)
        state.plan, state.decline = _only_hit(cache, req, prefix_len), Decline.FAULT
    cache.report.looked_up(time.perf_counter() - started)
    return state


def _says_nothing(req: "Req") -> bool:
    """Whether a request that gets no reuse did not ask for that itself."""
    return parse_options(req.sampling_params.custom_params, default="auto").mode == "auto"


def _of_an_adapter(cache: FuzzyRadixCache, req: "Req") -> Decline | None:
    """SGLang appends an adapter's id to the ``extra_key``: who sends such a key without the adapter
    would find text that it computed."""
    space = versions.namespace(req)
    if req.lora_id is not None:
        if cache.serves_adapters:  # else it is a word of a client's, and says nothing of the key
            cache.note_adapter(space)
        return Decline.LORA
    return Decline.LORA if cache.is_adapters(space) else None


def find_runs(cache: FuzzyRadixCache, req: "Req", prefix_len: int) -> tuple[Run, ...]:
    """Cached text in the request's prompt after its prefix hit."""
    return cache.fuzzy.match(
        cache.sync.space_of(versions.namespace(req)),
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
    if not runs and cache.branches.blend_of(req) is None:  # the most common case, and clear
        state.decline = Decline.NO_MATCH
        return
    _plan_with(cache, req, state, state.selector, runs)


def _only_hit(cache: FuzzyRadixCache, req: "Req", prefix_len: int) -> ReusePlan | None:
    """The plan that copies nothing: None where the prefix hit is exact."""
    blend = cache.branches.blend_of(req)
    prompt_len = len(req.full_untruncated_fill_ids)
    return None if blend is None else ReusePlan(prompt_len, prefix_len, (), (), blend)


def _plan_with(
    cache: FuzzyRadixCache,
    req: "Req",
    state: RequestReuse,
    selector: Selector,
    runs: tuple[Run, ...],
) -> None:
    prompt_len, prefix_len = len(req.full_untruncated_fill_ids), versions.prefix_len(req)
    blend = cache.branches.blend_of(req)
    plan = selector.plan(runs, prompt_len=prompt_len, prefix_len=prefix_len, budget=state.budget)
    rows = selector.most_rows(plan, budget=state.budget)
    declined = pays(plan, cache.config, rows=rows, found=bool(runs))
    if declined is None:
        state.plan = plan.behind(blend)
    elif blend is None:
        state.decline = declined
    else:  # what the prefix hit has of others' text is reuse enough
        state.plan = plan.nothing().behind(blend)


def _for_chunks(cache: FuzzyRadixCache, req: "Req", state: RequestReuse) -> RequestReuse:
    """SGLang gives the request only a part of its prompt: a selector that must see every row of it
    at once cannot choose, and the structural one does. Whether that pays is asked again."""
    assert state.plan is not None
    assert state.selector is not None
    if state.selector.sees is not Sees.SCORES:
        return state
    whole, structural = state.plan, cache.choosing.structural
    instead = _instead_of(state, cache)
    _plan_with(cache, req, instead, structural, whole.runs)
    # Nothing is evicted in between: the sources of the new plan are some of those of the old.
    cache.let_go(req, state)
    if instead.plan is None or not instead.plan.runs:
        return instead
    state.use(structural, instead.plan, Fallback.CHUNKED)
    cache.sources.lock(state)
    return state


def _admitted(adder: "PrefillAdder", req: "Req") -> bool:
    return bool(adder.can_run_list) and adder.can_run_list[-1] is req


def _attach(cache: FuzzyRadixCache, adder: "PrefillAdder", req: "Req", state: RequestReuse) -> None:
    """The request goes to prefill: remember, report and count its reuse."""
    req.kvshare = state
    if cache.queue is not None:
        cache.queue.admitted(req, state)
    if cache.pins is not None:
        cache.pins.came(req)
    known = req.customized_info or {}
    before = known.get("kvshare")  # it was retracted: its answer says how it began
    state.told = before is not None and told(before[0]) >= len(req.origin_input_ids)
    if state.plan is not None:
        cache.sources.note_use(state, again=before is not None)
    prefix_len = versions.prefix_len(req)
    if prefix_len and before is None:
        new = len(req.origin_input_ids) - prefix_len - cache.page_size
        cache.usage.touch_path(req.last_node, cache.root_node, new=new)
    state.admit(prefix_len=prefix_len)
    hit = state.record["blended_tokens"]
    if not state.told:
        if before is not None:
            state.go_on([*before.marks, before[0]])
        req.customized_info = {**known, "kvshare": OncePerAnswer(state, req)}
    if hit:
        _not_as_cached(adder, req, state, hit)


def _not_as_cached(adder: "PrefillAdder", req: "Req", state: RequestReuse, blended: int) -> None:
    """SGLang counts a prefix hit as cached: in an answer, its details, the log and the metrics. For
    users that word stays with exact KV."""
    adder.log_hit_tokens -= blended
    if req.retracted_stain:  # SGLang counts it as a hit of the second time, no more for the answer
        adder.reprocessed_log_hit_tokens -= blended
        return
    if hasattr(adder, "log_device_hit_tokens"):
        adder.log_device_hit_tokens -= blended
    req.already_computed += blended
    req.cached_tokens_device = state.record["exact_tokens"]
    req._cache_breakdown_computed = True
