"""Where a batch meets us: when SGLang has built it, and when it runs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvshare_sglang.runtime import attention, decode, doubt, prefill, profiles, slices
from kvshare_sglang.runtime.batch import BatchReuse
from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def hook_init_attention_backends(result: Any, runner: "ModelRunner", *args: Any, **kw: Any) -> None:
    """AFTER ``ModelRunner.init_attention_backends``: wrap what SGLang built."""
    attention.wrap(runner.attn_backend, runner)


def hook_init_new(
    original: Callable[..., Any],
    cls: type,
    batch: "ScheduleBatch",
    runner: "ModelRunner",
    **kw: Any,
) -> Any:
    """AROUND ``ForwardBatch.init_new``: the batch is built, its inputs are on the device, and we
    are on the forward stream, after every forward that wrote what we copy."""
    fb = original(cls, batch, runner, **kw)
    cache = getattr(batch, "tree_cache", None)
    kept = profiles.of_runner(runner)
    if kept is not None and fb.out_cache_loc is not None:
        kept.forget(fb.out_cache_loc)
    if isinstance(cache, FuzzyRadixCache) and fb.forward_mode.is_extend():
        fb.kvshare_shadow = cache.shadow.watch(batch, fb)
        fb.kvshare = slices.told_rows(fb, prefill.narrow(fb, batch, runner, cache))
    elif isinstance(cache, FuzzyRadixCache) and fb.forward_mode.is_decode():
        fb.kvshare = decode.watch(fb, batch, runner, cache)
    mode = fb.forward_mode
    if isinstance(cache, FuzzyRadixCache) and (mode.is_extend() or mode.is_decode()):
        fb.kvshare_doubts = doubt.watch(fb, batch, cache)
    return fb


def hook_forward(
    original: Callable[..., Any], runner: "ModelRunner", fb: "ForwardBatch", *args: Any, **kw: Any
) -> Any:
    """AROUND ``ModelRunner.forward``: SGLang rebuilds the batch inside and drops what are no
    fields, so what it carries is on the backend, for this call only."""
    backend = runner.attn_backend.kvshare

    def forward(part: Any) -> Any:
        for one in slices.passes(part, runner):
            backend.batch = getattr(one, "kvshare", None)
            try:
                out = original(runner, one, *args, **kw)
            finally:
                if backend.batch is not None and hasattr(runner, "shared_read_done_event"):
                    # Some backends say so once they have planned; ours reads the page table on.
                    runner.shared_read_done_event = None
                backend.batch = None
        return out

    reuse: BatchReuse | None = getattr(fb, "kvshare", None)
    if reuse is not None and reuse.stage is not None:
        out = reuse.stage.run(fb, runner, forward)
    else:
        out = forward(fb)
    return out


def hook_sample(
    original: Callable[..., Any],
    runner: "ModelRunner",
    logits_output: Any,
    fb: "ForwardBatch",
    *args: Any,
    **kw: Any,
) -> Any:
    """AROUND ``ModelRunner.sample``: the logits are there and no token is taken yet. With the
    overlap scheduler and a grammar that is after the batch before was looked through."""
    logits = logits_output.next_token_logits
    doubts: doubt.Doubts | None = getattr(fb, "kvshare_doubts", None)
    if doubts is not None and logits is not None:
        doubts.settle(fb, logits, runner, runner.forward)
    note: Callable[[Any], None] | None = getattr(fb, "kvshare_shadow", None)
    if note is not None:
        note(logits)
    return original(runner, logits_output, fb, *args, **kw)


def hook_can_run_graph(
    original: Callable[..., Any], graphs: Any, fb: "ForwardBatch", *args: Any, **kw: Any
) -> bool:
    """AROUND ``can_run_graph`` of both graph runners."""
    reuse: BatchReuse | None = getattr(fb, "kvshare", None)
    if reuse is not None and not _may_replay(graphs, reuse):
        return False
    return bool(original(graphs, fb, *args, **kw))


def _may_replay(graphs: Any, reuse: BatchReuse) -> bool:
    """Whether a captured graph can run what the batch carries. A breakable prefill graph calls
    attention between its parts, in Python and for the tokens that there are, so it runs any rows
    and stops where an observer says so; it cannot go on with fewer tokens. A captured decode step
    calls nothing that could look at its attention."""
    if reuse.rows is None:
        return reuse.observer is None
    breakable = getattr(graphs, "prefill_backend_name", None) == "breakable"
    narrows = reuse.observer is not None and reuse.observer.narrows
    return breakable and not narrows and attention.has_kernel(graphs.model_runner)
