"""What tests do inside the scheduler's process: read its state, force plans, plant faults."""

import functools
import itertools
from typing import Any

from kvshare_sglang.plan import Range, ReusePlan, Rows

DONOR = ("donor", None)  # the namespace that forced plans copy from


def force_plans(child: Any) -> None:
    """Requests with ``forced`` ranges compute just these rows; the rest is copied, unmoved, from
    the same text in the donor namespace: exact KV is in every skipped slot."""
    from kvshare_sglang.runtime import scheduler

    original = scheduler._plan

    def plan(cache: Any, req: Any, prefix_len: int, state: Any) -> None:
        original(cache, req, prefix_len, state)
        forced = child.specs[req.rid]["forced"]
        if forced is None:
            return
        prompt = scheduler.as_tokens(req.full_untruncated_fill_ids)
        (run,) = cache.fuzzy.match(cache.sync.space_of(DONOR), prompt, max_depth=0)
        assert (run.src_start, run.dst_start, run.length) == (0, 0, len(prompt))
        rows = Rows((max(a, prefix_len), b) for a, b in forced if b > prefix_len)
        state.decline = None
        state.plan = ReusePlan.computing(
            rows,
            prompt_len=len(prompt),
            prefix_len=prefix_len,
            runs=[run.cut(prefix_len, len(prompt))],
        )

    scheduler._plan = plan


def eight_bits_on_a_cpu() -> None:
    """A KV cache of 8 bits as other devices have it: SGLang has one on CPUs with AMX alone, and for
    one of its own backends."""
    from sglang.srt.mem_cache import kv_cache_configurator, kv_cache_dtype
    from sglang.srt.platforms import current_platform

    class Elsewhere:
        def is_cpu(self) -> bool:
            return False

        def __getattr__(self, name: str) -> Any:
            return getattr(current_platform, name)

    kv_cache_configurator.current_platform = kv_cache_dtype.current_platform = Elsewhere()


def break_joining(child: Any) -> None:
    """Rows that should join a batch in the middle make it fail there."""
    from kvshare_sglang.runtime import attention

    def put_tokens(*args: Any) -> None:
        raise RuntimeError("as a test wants it")

    attention.put_tokens = put_tokens


def check(child: Any) -> dict[str, int]:
    """Run the cache's self-check on an idle scheduler; sizes that must be zero or add up."""
    cache = child.cache
    cache.check()
    return {
        "protected": cache.protected_size(),
        "pins": cache.fuzzy.num_pins,
        "resident": cache.total_size(),
        "indexed": cache.fuzzy.num_tokens,
        "evictable": cache.evictable_size(),
        "available": child.scheduler.token_to_kv_pool_allocator.available_size(),
        "total": child.scheduler.max_total_num_tokens,
        "rows": child.scheduler.req_to_token_pool.available_size(),
    }


def counts(child: Any) -> dict[str, Any]:
    report = child.cache.report
    return {
        "tokens": dict(report.tokens),
        "declines": dict(report.declines),
        "fallbacks": dict(report.fallbacks),
        "doubts": dict(report.doubts),
    }


def verified(child: Any, params: list[dict[str, Any]]) -> list[bool]:
    """Which of the sampling parameters a process that tokenises lets pass."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    def passes(given: dict[str, Any]) -> bool:
        try:
            made = SamplingParams(**given)
            made.normalize(None)
            made.verify(child.runner.model_config.vocab_size)
        except Exception:  # SGLang's refusals are of any kind, TypeErrors too
            return False
        return True

    return [passes(given) for given in params]


def sampling_parameters(child: Any) -> list[str]:
    from sglang.srt.sampling.sampling_params import SamplingParams

    return list(SamplingParams.__struct_fields__)


def twins(child: Any) -> dict[str, Any]:
    """What the scheduler's shadow holds, and has counted."""
    shadow = child.cache.shadow
    return {
        **dict.fromkeys(("agree", "differ"), 0),
        **child.cache.report.twins,
        "waiting": shadow.num_waiting,
        "closed": shadow.gate.closed,
        "kls": [twin.kl for twin in shadow.gate._twins],
    }


def note_twins(child: Any) -> None:
    """Remember how many twins wait at this moment of a script."""
    child.noted = [*getattr(child, "noted", ()), child.cache.shadow.num_waiting]


def noted_twins(child: Any) -> list[int]:
    noted, child.noted = child.noted, []
    return list(noted)


def break_twins(child: Any, function: str) -> None:
    """Make a function of SGLang's raise where a twin calls it; none: as it was."""
    from unittest import mock

    from kvshare_sglang.runtime import versions

    real = child.prefill_once = getattr(child, "prefill_once", versions.prefill_once)

    def broken(*args: Any) -> Any:
        with mock.patch(function, side_effect=RuntimeError("planted")):
            return real(*args)

    versions.prefill_once = broken if function else real


def decide_early(child: Any, least: int) -> None:
    """Let so few twins close the gate, so that a test needs no more."""
    from kvshare_sglang.policy import shadow

    shadow.LEAST = least


def look_at(child: Any, depth: float) -> None:
    """Move the probe layer."""
    import dataclasses

    child.cache.config = dataclasses.replace(child.cache.config, probe_at=depth)


def attend_to(child: Any, start: int, stop: int) -> None:
    """Let every trace see attention to prompt ``[start, stop)`` alone; to no row: as it was."""
    from kvshare_sglang.policy.select.attention_trace import Trace

    real = getattr(Trace, "_real", Trace.feed)
    Trace._real = real  # type: ignore[attr-defined]

    def feed(self: Any, mass: Any) -> None:
        mass = mass * 0
        mass[start:stop] = 1
        real(self, mass)

    Trace.feed = feed if stop > start else real  # type: ignore[method-assign]


def watch_padding(child: Any) -> None:
    """Note for each prompt's part that torch's attention pads: tokens that it is padded by, once
    for all layers."""
    kind = type(child.runner.attn_backend).__mro__[1]
    real, child.padded = kind._run_sdpa_forward_extend, []

    def padding(self: Any, *args: Any, **kw: Any) -> Any:
        prefixes = kw.get("extend_prefix_lens", args[7] if len(args) > 7 else None)
        if not child.padded or child.padded[-1] is not prefixes:
            child.padded.append(prefixes)
        return real(self, *args, **kw)

    kind._run_sdpa_forward_extend = padding


def padded(child: Any) -> list[int]:
    """Tokens that prompts were padded by since it was last asked."""
    noted, child.padded = child.padded, []
    return [int(n) for prefixes in noted for n in prefixes if n > 0]


def switch(child: Any, settings: dict[str, float]) -> bool:
    """What POST /set_internal_state does in the scheduler."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    asked = SetInternalStateReq(server_args=settings)
    return bool(child.scheduler.set_internal_state(asked).updated)


def calibration_of(child: Any) -> str:
    return str(child.cache.config.calibration)


def doubt_of(child: Any) -> float:
    """What the server doubts by default."""
    return float(child.cache.config.doubt)


def prefill_order(child: Any) -> list[str]:
    """Requests in the order in which their prompts came to prefill."""
    return list(child.logits)


def queue_state(child: Any) -> dict[str, int]:
    """What an idle scheduler still holds of requests that waited, and what it counted. What was in
    prefill is over without a next round; who left the queue is forgotten in it."""
    queue, report = child.cache.queue, child.cache.report
    if queue is None:
        return {"kept": -1, "waits": report.waits, "overtaken": report.most_overtaken}
    in_prefill = len(queue._started) + len(queue._waiting.computing)
    queue._follow([])
    kept = (queue._held, queue._later, queue._hoped, queue._text, queue._new, queue._tenants)
    return {
        "kept": in_prefill + sum(map(len, kept)) + len(queue._waiting),
        "waits": report.waits,
        "overtaken": report.most_overtaken,
    }


def break_order(child: Any) -> None:
    """The order of the queue fails to be made, every second time of the next ten."""
    queue = child.cache.queue
    original, calls = queue._order, itertools.count()

    def order() -> Any:
        if (call := next(calls)) < 10 and call % 2:
            raise RuntimeError("a planted fault")
        return original()

    queue._order = order


def note_prefill(child: Any) -> None:
    """Remember whose text others may wait for at this moment of a script."""
    queue = child.cache.queue
    computing = {req.rid for req, text in queue._waiting._computing.items() if len(text)}
    books = {req.rid for req in queue._started}, computing
    child.noted = [*getattr(child, "noted", ()), books]


def noted_prefill(child: Any) -> list[tuple[set[str], set[str]]]:
    noted, child.noted = child.noted, []
    return list(noted)


def reported(child: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Prompt tokens by kind, and declines by reason, counted so far."""
    report = child.cache.report
    return dict(report.tokens), dict(report.declines)


def pause(child: Any) -> None:
    """What /pause_generation with mode retract does: what runs is retracted and waits."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    child.scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))


def resume(child: Any) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    child.scheduler.continue_generation(ContinueGenerationReqInput())


def forget_no_twin(child: Any, on: bool) -> None:
    """No one is told that a request in prefill was released; when it ends, it is made good."""
    queue = child.cache.queue
    if on:
        queue.released = lambda req: None
    else:
        del queue.released
        for req in list(queue._started):
            queue.released(req)


def find_nothing(child: Any, on: bool) -> None:
    """Lookups find no cached text, though it is there."""
    tree = child.cache.fuzzy
    if on:
        tree.match = lambda *args, **kw: ()
    else:
        del tree.match


def break_waiting(child: Any, name: str) -> None:
    """A method of the book of waiting requests raises, until ``mend_waiting``."""
    from kvshare_sglang.policy.waiting import Waiting

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("a planted fault")

    child.mend = functools.partial(setattr, Waiting, name, getattr(Waiting, name))
    setattr(Waiting, name, broken)


def mend_waiting(child: Any) -> dict[str, Any]:
    """Whether the order was off by then, and faults so far. It is on again, and knows nothing."""
    child.mend()
    queue = child.cache.queue
    off, queue.off = queue.off, False
    queue._failed_rounds = 0
    return {"off": off, "faults": child.cache.report.schedule_faults}


def queue_faults(child: Any) -> int:
    return int(child.cache.report.schedule_faults)


def count_give_backs(child: Any) -> None:
    """Count how often pins were asked to be given back."""
    it = child.cache.pins
    original, child.num_yields = it.give_back, 0

    def counted(tokens: int) -> bool:
        child.num_yields += 1
        return bool(original(tokens))

    it.give_back = counted


def break_learned(child: Any, on: bool) -> None:
    """What is learned of gaps between turns raises."""
    learned = child.cache.pins.learned
    if on:
        learned.gap = None
    else:
        del learned.gap


def note_ended(child: Any) -> None:
    """Remember which requests of a script have ended by now."""
    child.ended = [rid for rid, req in child.reqs.items() if req.finished()]


def noted_ended(child: Any) -> list[str]:
    return list(child.ended)


def pins(child: Any) -> dict[str, Any]:
    """What finished turns keep, and what became of them so far."""
    it = child.cache.pins
    return {"num": it.num, "tokens": it.tokens, "events": dict(child.cache.report.pins)}


def pass_time(child: Any, seconds: float) -> None:
    """So much later for finished turns, whose clock stands still from the first call on."""
    it = child.cache.pins
    now = it.clock() + seconds
    it.clock = lambda: now
    it.expire()


def layer_rows(child: Any) -> list[list[int]]:
    return child.layer_rows


def tagged_sizes(child: Any) -> list[tuple[int, int]]:
    """(depth, tokens) of each stretch of inexact KV that may be a source."""
    segments = child.cache.fuzzy._segments.values()
    return [(s.depth, len(s.tokens)) for s in segments if s.depth]


def cut_off(child: Any) -> int:
    """How many stretches of new text hang at the root because copies before them are gone."""
    from kvshare_sglang.runtime.cache.index_sync import BranchKey

    nodes = child.cache.root_node.children.values()
    return sum(
        isinstance(node.key.extra_key, BranchKey) and node.kvshare.start > 0 for node in nodes
    )


def plain_keys_of_depth(child: Any) -> set[int]:
    """Depths found in the plain branch; it must hold exact KV only."""
    from kvshare_sglang.runtime.cache.index_sync import BranchKey

    depths, stack = set(), list(child.cache.root_node.children.values())
    while stack:
        node = stack.pop()
        if not isinstance(node.key.extra_key, BranchKey):
            depths.add(node.kvshare.segment.depth)
            stack.extend(node.children.values())
    return depths


def hook_points(child: Any) -> dict[str, bool]:
    """Which functions of SGLang are wrapped by anything of ours at this moment."""
    from kvshare_sglang.runtime import hooks

    return {point.target: hooks.applied(point) for point in hooks.WRAPPED}


def cache_class(child: Any) -> str:
    return type(child.cache).__name__


def break_lookup(child: Any) -> None:
    """Make every lookup raise, as a bug of ours would."""

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("planted")

    child.cache.fuzzy.match = broken


def break_structural_plans(child: Any) -> None:
    """Make every structural plan raise: the one for a prompt in chunks, once it is admitted."""
    from kvshare_sglang.policy.select.window import Window

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("planted")

    Window.plan = broken


def break_copy(child: Any) -> None:
    """Make every copy raise half way, with garbage written."""
    from kvshare_sglang.runtime import copying

    def broken(runner: Any, rows: Any, **kw: Any) -> None:
        runner.token_to_kv_pool.get_key_buffer(0)[rows.dst_slots] = 1e3
        raise RuntimeError("planted")

    copying.copy_kv = broken


def break_choice(child: Any) -> None:
    """Make every look at attention raise, at a check layer and on a trace."""
    from kvshare_sglang.runtime import dhd, probe

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("planted")

    dhd.attention_mass = probe.attention_mass = broken


def break_refresh(child: Any) -> None:
    """Make every refresh raise before it writes."""
    from kvshare_sglang.runtime import decode

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("planted")

    decode.follow = broken


def break_doubts(child: Any, what: str) -> None:
    """Make every look at a margin raise, or every pass that settles one."""
    from kvshare_sglang.runtime import doubt

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("planted")

    setattr(doubt, {"the pass": "sub_batch", "the margin": "margins"}[what], broken)


def break_watch(child: Any) -> None:
    """Make every look at a decode step raise."""
    from kvshare_sglang.runtime import decode

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("planted")

    decode.attention_mass = broken


def break_watched(child: Any) -> None:
    """Make every watch hold a row that the tree shares."""
    from kvshare_sglang.policy.refresh import Watch

    original = Watch.of_plan

    def wrong(plan: ReusePlan) -> Watch:
        watch = original(plan)
        watch.open[0] = True
        return watch

    Watch.of_plan = wrong


def count_yields(child: Any) -> None:
    """Count how often sources were really given back."""
    sources = child.cache.sources
    original, child.num_yields = sources.give_back, 0

    def counted() -> bool:
        gave: bool = original()
        child.num_yields += gave
        return gave

    sources.give_back = counted


def yields(child: Any) -> int:
    return child.num_yields


def yield_once_between(child: Any, low: int, high: int) -> None:
    """Give sources back when a chunked request has done between ``low`` and ``high`` tokens."""
    count_yields(child)
    scheduler = child.scheduler
    original = scheduler.get_next_batch_to_run

    def get_next(*args: Any, **kw: Any) -> Any:
        state = getattr(scheduler.chunked_req, "kvshare", None)
        reusing = state is not None and state.plan is not None
        if reusing and low <= state.done < high and not child.num_yields:
            child.cache.sources.give_back()
        return original(*args, **kw)

    scheduler.get_next_batch_to_run = get_next


def retract_every(child: Any, forwards: int) -> None:
    """As SGLANG_TEST_RETRACT does, which counts only while SGLang is imported."""
    from sglang.srt.managers import scheduler

    assert scheduler.TEST_RETRACT is False
    scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = True, forwards


def update_weights(child: Any, path: str, flush: bool = True) -> bool:
    """What /update_weights_from_disk does in the scheduler."""
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    output = child.scheduler.weight_updater.update_weights_from_disk(
        UpdateWeightFromDiskReqInput(model_path=path, load_format="auto", flush_cache=flush)
    )
    return bool(output.success)


def write_weights(child: Any) -> bool:
    """What a trainer's RDMA does: a session in which SGLang itself loads nothing."""
    return begin_weights(child) and end_weights(child)


def begin_weights(child: Any) -> bool:
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput

    updater = child.scheduler.weight_updater
    return bool(updater.begin_weight_update(BeginWeightUpdateReqInput()).success)


def end_weights(child: Any) -> bool:
    from sglang.srt.managers.io_struct import EndWeightUpdateReqInput

    updater = child.scheduler.weight_updater
    return bool(updater.end_weight_update(EndWeightUpdateReqInput()).success)


def no_pinning() -> None:
    """SGLang's LoRA layers pin host memory, which only a machine with an accelerator can."""
    import functools

    import torch

    def unpinned(make: Any) -> Any:
        @functools.wraps(make)
        def wrapper(*args: Any, pin_memory: bool = False, **kw: Any) -> Any:
            return make(*args, **kw)

        return wrapper

    for name in ("tensor", "empty", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor: tensor


def charge_all_tokens() -> None:
    """Admit by tokens, not by rows, as where a request with hidden states decodes in the batch."""
    from kvshare_sglang.runtime import charging

    charging._cost = lambda adder, state: None


def few_stretches_and_all_tokens_charged() -> None:
    stretches_as_on_a_gpu()
    charge_all_tokens()


def stretches_as_on_a_gpu() -> None:
    """Bound the stretches of rows by --max-running-requests, as attention on a GPU does; the CPU's
    own attention takes any number."""
    from kvshare_sglang.runtime import batch

    batch.takes_any_ranges = lambda runner: False


# ---- planted faults: each must make a named test fail ------------------------------------------


def mutate_no_rotation() -> None:
    """K is copied without re-rotation."""
    from kvshare_sglang.kernels import rope_shift

    rope_shift.rotate_keys = lambda keys, shift, *, is_neox: keys


def mutate_off_by_one() -> None:
    """K is rotated as if it had stood one position further."""
    from kvshare_sglang.kernels import rope_shift

    original = rope_shift.plan_shift
    rope_shift.plan_shift = lambda table, old, new: original(table, old + 1, new)


def mutate_exact_len_ignored() -> None:
    """All of a reusing request enters the plain branch."""
    ReusePlan.exact_len = property(lambda plan: plan.prompt_len)


def mutate_copy_early() -> None:
    """KV is copied when the request is admitted, before the batch has its slots."""
    import torch

    from kvshare_sglang.runtime import copying, scheduler, support

    attach = scheduler._attach
    empty = torch.empty(0, dtype=torch.int64)
    rows_of = copying.rows_of
    copying.rows_of = lambda *args: copying.Copy(empty, empty, empty, empty)

    def early(cache: Any, req: Any, state: Any) -> None:
        attach(cache, req, state)
        if state.plan is None:
            return
        row = cache.req_to_token_pool.req_to_token[0].long()
        rows = rows_of(state, state.plan.copies, Range(0, len(row)), row)
        copying.copy_kv(early.runner, rows)

    scheduler._attach = early
    check_model = support.check_model

    def note_runner(runner: Any, ctx: Any = None) -> None:
        early.runner = runner
        check_model(runner, ctx)

    support.check_model = note_runner


def mutate_sources_not_locked() -> None:
    """Sources are read but neither pinned nor locked."""
    from kvshare_sglang.runtime.cache.sources import Sources

    original = Sources.lock

    def lock(sources: Any, state: Any) -> None:
        original(sources, state)
        sources.unlock(state)

    Sources.lock = lock


def uses(child: Any) -> list[float]:
    """What the text of each segment's first node counts as used."""
    segments = child.cache.fuzzy._segments.values()
    return [s.payload.nodes[0].kvshare.frequency.uses for s in segments]


def keep_profiles(child: Any) -> None:
    """Of requests whose KV is kept, also what their rows attended to, answers included."""
    read, child.profiles = child.read_kv, {}

    def both(req: Any) -> Any:
        row = req.kv.req_pool_idx if hasattr(req.kv, "req_pool_idx") else req.req_pool_idx
        known = len(req.origin_input_ids) + len(req.output_ids) - 1
        slots = child.scheduler.req_to_token_pool.req_to_token[row, :known]
        child.profiles[req.rid] = child.runner.attn_backend.kvshare.profiles.of(slots).cpu().numpy()
        return read(req)

    child.read_kv = both


def profiles(child: Any, rid: str) -> Any:
    return child.profiles[rid]


def break_profiles(child: Any) -> None:
    """What rows attend to cannot be noted."""
    from kvshare_sglang.kernels import row_scores

    def attention_profile(*args: Any, **kw: Any) -> None:
        raise RuntimeError("as a test wants it")

    row_scores.attention_profile = attention_profile
