"""Match a request, plan its reuse and lock its sources as SGLang admits it. Root layer."""

import logging
import time
from collections.abc import Callable
from typing import Any

from kvshare_sglang import compat
from kvshare_sglang.cache import FuzzyRadixCache, as_tokens
from kvshare_sglang.policy.gate import Decline, RequestView, may_reuse, parse_options, pays
from kvshare_sglang.radix_fuzzy.reuse import plan_reuse
from kvshare_sglang.radix_fuzzy.types import ReusePlan
from kvshare_sglang.request import OncePerAnswer, RequestReuse

logger = logging.getLogger(__name__)


def hook_verify(result: Any, params: Any, *args: Any, **kw: Any) -> None:
    """AFTER ``SamplingParams.verify``: bad request options are a 400, like SGLang's own."""
    parse_options(params.custom_params)


def hook_validate_input_length(error: str | None, req: Any, *args: Any, **kw: Any) -> str | None:
    """AFTER ``scheduler.validate_input_length``, which every request passes whatever door it came
    through: a prompt of no tokens ends SGLang 0.5.22 and later; with us it is a 400."""
    if error is None and not len(req.origin_input_ids):
        return "the prompt has 0 tokens, at least 1 is needed"
    return error


def hook_add_one_req(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kw: Any
) -> Any:
    """AROUND ``PrefillAdder.add_one_req``.

    The sources are locked before SGLang counts what it may evict, so that what it admits fits.
    Where a request does not fit with its sources locked, it is tried again without reuse.
    """
    cache = adder.tree_cache
    if not isinstance(cache, FuzzyRadixCache):
        return original(adder, req, *args, **kw)
    cache.release(req)
    state = propose(cache, req)
    if state.plan is not None:
        try:
            cache.lock_sources(state)
        except Exception:
            logger.exception("KVShare could not lock the sources of request %s", req.rid)
            cache.unlock_sources(state)
            state = RequestReuse(None, Decline.FAULT)
    result = original(adder, req, *args, **kw)
    if state.plan is not None and not _admitted(adder, req):
        cache.unlock_sources(state)
        state = RequestReuse(None, Decline.NO_ROOM)
        result = original(adder, req, *args, **kw)
    if _admitted(adder, req):
        _attach(cache, req, state)
    return result


def propose(cache: FuzzyRadixCache, req: Any) -> RequestReuse:
    """What the request should reuse, or why nothing. Changes nothing but a note on the request."""
    options = parse_options(req.sampling_params.custom_params)
    reason = may_reuse(_view(req, options.mode))
    if reason is not None:
        return RequestReuse(None, reason)
    budget = cache.config.budget if options.budget is None else options.budget
    prefix_len = compat.prefix_len(req)
    # A waiting request is looked up again only after its namespace or its prefix hit changed.
    key = cache.fuzzy.stamp(compat.namespace(req)), prefix_len, len(req.full_untruncated_fill_ids)
    noted = getattr(req, "kvshare_proposal", None)
    if noted is not None and noted[0] == key:
        plan, reason = noted[1]
    else:
        started = time.perf_counter()
        try:
            plan, reason = _plan(cache, req, prefix_len, budget)
        except Exception:
            # Reuse must never fail a request; the fault is logged and counted, not hidden.
            logger.exception("KVShare lookup failed for request %s", req.rid)
            plan, reason = None, Decline.FAULT
        cache.report.looked_up(time.perf_counter() - started)
        req.kvshare_proposal = key, (plan, reason)
    return RequestReuse(plan, reason, budget)


def _plan(
    cache: FuzzyRadixCache, req: Any, prefix_len: int, budget: float
) -> tuple[ReusePlan | None, Decline | None]:
    config = cache.config
    prompt = as_tokens(req.full_untruncated_fill_ids)
    runs = cache.fuzzy.match(
        compat.namespace(req),
        prompt,
        start=prefix_len,
        max_depth=config.source_depth,
        tolerance=config.edit_tolerance,
    )
    plan = plan_reuse(
        runs,
        prompt_len=len(prompt),
        prefix_len=prefix_len,
        budget=budget,
        seam=config.seam,
        window=config.window,
    )
    reason = pays(plan, config, found=bool(runs))
    return (plan, None) if reason is None else (None, reason)


def _view(req: Any, mode: str) -> RequestView:
    prompt_logprobs = req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids)
    inputs = (
        req.multimodal_inputs,
        req.input_embeds,
        getattr(req, "positional_embed_overrides", None),
    )
    return RequestView(
        mode=mode,
        lora=req.lora_id is not None,
        prompt_logprobs=bool(prompt_logprobs),
        hidden_states=bool(req.return_hidden_states),
        prefill_only=bool(req.is_prefill_only),
        multimodal=any(value is not None for value in inputs),
        session=getattr(req, "session", None) is not None,
        beam_search=getattr(req, "beam_group", None) is not None,
    )


def _admitted(adder: Any, req: Any) -> bool:
    return bool(adder.can_run_list) and adder.can_run_list[-1] is req


def _attach(cache: FuzzyRadixCache, req: Any, state: RequestReuse) -> None:
    """The request goes to prefill: remember, report and count its reuse."""
    req.kvshare = state
    req.kvshare_proposal = None
    if state.plan is not None:
        cache.note_use(state)
    exact = compat.prefix_len(req)
    if exact:
        cache.note_prefix_hit(req.last_node)
    cache.report.admitted(exact, state.decline)
    # Rows are counted as they run.
    state.info = {
        "exact_tokens": exact,
        "fuzzy_tokens": 0,
        "recomputed_tokens": 0,
        "computed_tokens": 0,
        "source_depth": state.plan.depth if state.plan else 0,
        "declined": state.decline.value if state.decline else None,
    }
    req.customized_info = {**(req.customized_info or {}), "kvshare": OncePerAnswer(state.info, req)}
