"""What the GPU oracles do inside the scheduler's process."""

import os
from collections import Counter
from typing import Any


def prepare(child: Any) -> None:
    """Count how prefill batches run, and send answers from the CPU.

    A tensor that crosses the pipe from a GPU stays owned by the sender, which frees it.
    """
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter  # noqa: F401  (mended; its functions are looked up when called)

    play = child.play

    def on_cpu(script: list[Any]) -> dict[str, dict[str, Any]]:
        answers = play(script)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the last reads of KV may still be under way
        return {
            rid: {name: _to_cpu(value) for name, value in answer.items()}
            for rid, answer in answers.items()
        }

    child.play = on_cpu
    child.ways = Counter()
    runner = child.runner
    ways = {"eager": runner.eager_runner}
    graphs = runner.prefill_cuda_graph_runner
    if graphs is not None and graphs is not runner.eager_runner:
        ways["graph"] = graphs
    for way, executor in ways.items():
        executor.execute = _counted(child, way, executor.execute)
    from kvshare_sglang.runtime import trace_on_device

    follow = trace_on_device.follow

    def counted(*args: Any, **kw: Any) -> None:
        child.ways["traces on the device"] += 1
        follow(*args, **kw)

    trace_on_device.follow = counted


def _counted(child: Any, way: str, execute: Any) -> Any:
    def counted(fb: Any, *args: Any, **kw: Any) -> Any:
        if fb.forward_mode.is_extend():
            reuse = getattr(child.runner.attn_backend, "kvshare", None)
            partial = reuse is not None and reuse.batch is not None and reuse.batch.rows is not None
            child.ways[f"{'partial' if partial else 'full'}, {way}"] += 1
        return execute(fb, *args, **kw)

    return counted


def _to_cpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_to_cpu, value))
    return value.cpu() if hasattr(value, "cpu") else value


def has_kernel(child: Any) -> bool:
    """Whether partial batches are attended by our own kernel."""
    from kvshare_sglang.runtime import attention

    return attention.has_kernel(child.runner)


def prefill_ways(child: Any) -> dict[str, int]:
    """How many prefill batches ran full or partial, by graph or eagerly."""
    return dict(child.ways)


def start_profile(child: Any) -> None:
    """Record what runs from now on, on the host and on a GPU."""
    import torch

    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    child.profile = torch.profiler.profile(activities=kinds)
    child.profile.start()


def stop_profile(child: Any) -> dict[str, Any]:
    """From the first to the last kernel: time in kernels, in the gaps between them, and what took
    longest. Without a GPU the host's operations are taken for kernels."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    child.profile.stop()
    cuda = [e for e in child.profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # Scopes that SGLang names cover whole batches, on the GPU's timeline too.
    kernels = [e for e in cuda if not getattr(e, "is_user_annotation", False)]
    used = kernels or [e for e in child.profile.events() if e.name.startswith("aten::")]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in used]
    return summed_up([span for span in spans if not span[0].startswith("scheduler.")])


def summed_up(spans: list[tuple[str, float, float]], *, most: int = 15) -> dict[str, Any]:
    """Of (name, start, end) in us: in ms the whole span, what is busy in it, the longest kernels,
    and the longest gaps with what is before and behind them."""
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    busy, gaps, reach, last = 0.0, [], None, ""
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        total[name] += end - start
        calls[name] += 1
        if reach is not None and start > reach:
            gaps.append((start - reach, last, name))
        busy += max(0.0, end - max(start, reach if reach is not None else start))
        if reach is None or end > reach:
            reach, last = end, name
    idle = sum(gap for gap, _, _ in gaps)
    return {
        "span_ms": round((busy + idle) / 1e3, 3),
        "busy_ms": round(busy / 1e3, 3),
        "gaps_ms": round(idle / 1e3, 3),
        "gaps_above_50us": sum(gap > 50 for gap, _, _ in gaps),
        "longest_gaps": [
            {"ms": round(gap / 1e3, 3), "after": before[:80], "before": behind[:80]}
            for gap, before, behind in sorted(gaps, reverse=True)[:most]
        ],
        "kernels": sum(calls.values()),
        "longest": [
            {"name": name[:120], "ms": round(us / 1e3, 3), "calls": calls[name]}
            for name, us in total.most_common(most)
        ],
    }
