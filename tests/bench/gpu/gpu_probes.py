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

        from kvshare_sglang.kernels.gpu import copy

        copy.ROWS = 32  # a program takes as long for more tokens

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


def compare_passes(child: Any) -> None:
    """Run each traced pass that is replayed once more, layer by layer, and note how far apart their
    attention is. Without a GPU nothing is recorded by itself: record some sizes now."""
    from kvshare_sglang.policy.select.attention_trace import probe_layer
    from kvshare_sglang.runtime import (
        attention,
        attention_trace,
        probe,
        trace_graphs,
        trace_on_device,
    )

    state, layers = child.runner.attn_backend.kvshare, child.runner.model.model.layers
    cache = child.scheduler.tree_cache
    if child.runner.device == "cpu" and attention.has_kernel(child.runner):
        layer = probe_layer(len(layers), cache.config.probe_at)
        state.recorded = trace_graphs.TraceGraphs(child.runner, layer, (16, 40))
    child.passes_off = []

    def both(*args: Any, recorded: Any, **kw: Any) -> Any:
        found = probe.attention_of(*args, recorded=recorded, **kw)
        if recorded is not None and recorded.take(args[1]):
            plain = probe.attention_of(*args, recorded=None, **kw)
            child.passes_off += [
                float((a - b).abs().max() / b.abs().max())
                for a, b in zip(found, plain, strict=True)
            ]
        return found

    attention_trace.attention_of = trace_on_device.attention_of = both


def compare_no_more(child: Any) -> None:
    """Undo ``compare_passes``."""
    from kvshare_sglang.runtime import attention_trace, probe, trace_on_device

    attention_trace.attention_of = trace_on_device.attention_of = probe.attention_of


def passes_off(child: Any) -> list[float]:
    """By request of each pass that was replayed: the largest difference over the largest value."""
    return list(child.passes_off)


def has_kernel(child: Any) -> bool:
    """Whether partial batches are attended by our own kernel."""
    from kvshare_sglang.runtime import attention

    return attention.has_kernel(child.runner)


def gave_way(child: Any) -> list[str]:
    """What of our kernels could not be launched, and runs by torch for good."""
    from kvshare_sglang.kernels import ops

    found = [f"attention mass {kind}" for kind in ops._MASS_FAILED]
    copier = getattr(child.runner, "kvshare_copier", None)
    if copier is not None and copier[3] != "auto" and has_kernel(child):
        found.append("copy")
    return found


def notes_profiles(child: Any) -> bool:
    """Whether what rows attend to is still noted."""
    kept = child.runner.attn_backend.kvshare.profiles
    return kept is not None and kept.layer >= 0


def priors_off(child: Any) -> float:
    """How far what the device makes of profiles is from its definition, over a few plans."""
    import numpy as np
    import torch

    from kvshare_sglang.plan import Join, ReusePlan, Run
    from kvshare_sglang.policy.select.dependence import EDGES, outside
    from kvshare_sglang.runtime.profiles import outside_on_device

    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(5):
        runs = (Run(1, 64, 10, 100), Run(1, 170, 112, 60, join=Join.EDIT), Run(2, 9, 180, 40))
        plan = ReusePlan(260, 0, runs, runs)
        profiles = np.sort(rng.random((260, len(EDGES))).astype(np.float32))[:, ::-1].copy()
        profiles[rng.random(260) < 0.2] = np.nan
        there = outside_on_device(plan, torch.from_numpy(profiles).to(child.runner.device))
        want = outside(plan, profiles)
        assert want is not None
        worst = max(worst, float(np.abs(there.cpu().numpy() - want).max()))
    return worst


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


def start_host_profile(child: Any) -> None:
    """Note what Python does from now on in the scheduler's thread."""
    import cProfile

    child.host_profile = cProfile.Profile()
    child.host_profile.enable()


def stop_host_profile(child: Any, requests: int = 1, most: int = 60) -> list[dict[str, Any]]:
    """The functions that took longest, what they called included: ms and calls by request. The
    profiler makes small functions look two to three times as slow as they are."""
    child.host_profile.disable()
    child.host_profile.create_stats()
    rows = []
    for (file, line, name), (_, calls, own, whole, _) in child.host_profile.stats.items():
        at = "/".join(file.split("/")[-2:]) + f":{line} {name}"
        rows.append((whole, own, calls, at))
    return [
        {
            "function": at,
            "ms": round(1e3 * whole / requests, 3),
            "own_ms": round(1e3 * own / requests, 3),
            "calls": round(calls / requests, 2),
        }
        for whole, own, calls, at in sorted(rows, reverse=True)[:most]
    ]


def parts_of(spans: list[tuple[str, float, float]], ends: tuple[str, ...]) -> list[dict[str, Any]]:
    """The timeline of (name, start, end) in us, cut after each kernel of ``ends``: how long each
    part took, and how much of it was busy, in ms."""
    out: list[dict[str, Any]] = []
    first = reach = None
    busy = 0.0
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        first = start if first is None else first
        busy += max(0.0, end - max(start, start if reach is None else reach))
        reach = end if reach is None else max(reach, end)
        if name.startswith(ends):
            out.append({"up_to": name[:40], "ms": (reach - first) / 1e3, "busy_ms": busy / 1e3})
            first, busy = reach, 0.0
    if first is not None and reach is not None:
        out.append({"up_to": "the end", "ms": (reach - first) / 1e3, "busy_ms": busy / 1e3})
    return [{k: round(v, 3) if k != "up_to" else v for k, v in part.items()} for part in out]


def summed_up(spans: list[tuple[str, float, float]], *, most: int = 15) -> dict[str, Any]:
    """Of (name, start, end) in us: in ms the whole span, what is busy in it, the longest kernels,
    the longest gaps with what is before and behind them, and the parts of a trace."""
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
        "parts": parts_of(spans, ("_copy", "_mass")),
        "kernels": sum(calls.values()),
        "longest": [
            {"name": name[:120], "ms": round(us / 1e3, 3), "calls": calls[name]}
            for name, us in total.most_common(most)
        ],
    }


def doubt_now(child: Any) -> None:
    """Whatever the requests that run get next is in doubt."""
    for req in child.scheduler.running_batch.reqs:
        if getattr(req, "kvshare", None) is not None:
            req.kvshare.doubt = 1000.0
