"""What the GPU oracles do inside the scheduler's process."""

from collections import Counter
from typing import Any


def prepare(child: Any) -> None:
    """Count how prefill batches run, and send answers from the CPU.

    A tensor that crosses the pipe from a GPU stays owned by the sender, which frees it.
    """
    import torch

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


def _counted(child: Any, way: str, execute: Any) -> Any:
    def counted(fb: Any, *args: Any, **kw: Any) -> Any:
        if fb.forward_mode.is_extend():
            rows = getattr(child.runner.attn_backend, "kvshare_rows", None)
            child.ways[f"{'full' if rows is None else 'partial'}, {way}"] += 1
        return execute(fb, *args, **kw)

    return counted


def _to_cpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_to_cpu, value))
    return value.cpu() if hasattr(value, "cpu") else value


def prefill_ways(child: Any) -> dict[str, int]:
    """How many prefill batches ran full or partial, by graph or eagerly."""
    return dict(child.ways)
