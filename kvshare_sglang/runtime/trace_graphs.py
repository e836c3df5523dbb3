"""Traced passes that are recorded at start and replayed: the host launches one thing, not hundreds.

It, not the GPU, decided how long a short pass took.

A pass runs the layers below the probe layer for some rows; only their number matters to a launch.
For a few sizes these layers, attention included, are recorded over buffers that stay in place. A
pass is padded to the next size: rows that stand in are token 0 of the first request, and write to
SGLang's padding slot. Attention mass is computed behind the replay, for it depends on the prompt's
length.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvshare_sglang.kernels import ops
from kvshare_sglang.runtime import attention, versions
from kvshare_sglang.runtime.batch import (
    STOP,
    BatchReuse,
    LayerView,
    Part,
    Stop,
    StopForward,
    on_device,
    to_device,
)
from kvshare_sglang.runtime.probe import Asking, mass_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

SIZES = (*range(64, 513, 64), *range(640, 1025, 128), *range(1280, 2049, 256))
MOST_REQUESTS = 8  # of one pass


class TraceGraphs:
    """The recordings of a server, by number of rows."""

    def __init__(self, runner: "ModelRunner", layer: int, sizes: Sequence[int]) -> None:
        """Record all sizes, the largest first: they share one pool of memory. Raises whatever the
        model or the recording does."""
        how = runner.attn_backend.kvshare.how
        assert isinstance(how, ops.Attention)
        self._runner, self._layer, self._how, self._sizes = runner, layer, how, sorted(sizes)
        device = runner.device

        def zeros(num: int) -> torch.Tensor:
            return torch.zeros(num, dtype=torch.int64, device=device)

        largest = self._sizes[-1]
        self._ids, self._positions, self._slots = zeros(largest), zeros(largest), zeros(largest)
        self._owners = zeros(MOST_REQUESTS)
        pool = None if str(device) == "cpu" else torch.cuda.graph_pool_handle()
        self._recorded = {size: self._record(size, pool) for size in reversed(self._sizes)}

    def take(self, parts: Sequence[Part]) -> bool:
        """Whether a pass of these parts can be replayed."""
        rows = sum(part.rows.num for part in parts)
        return rows <= self._sizes[-1] and len(parts) <= MOST_REQUESTS

    def attention_of(
        self, fb: "ForwardBatch", parts: Sequence[Part], asking: Sequence[Asking]
    ) -> list[torch.Tensor]:
        """As ``probe.attention_of``, by a replay."""
        counts = [part.rows.num for part in parts]
        num = sum(counts)
        size = next(size for size in self._sizes if size >= num)
        tiles, replay = self._recorded[size]
        at = 0
        for i, part in enumerate(parts):
            here = slice(at, at + part.rows.num)
            self._ids[here].copy_(part.ids)
            self._slots[here].copy_(part.slots)
            self._positions[here].copy_(on_device(part.rows, self._ids.device))
            self._owners[i : i + 1].copy_(fb.req_pool_indices[part.number : part.number + 1])
            at += part.rows.num
        self._slots[num:size].zero_()
        self._positions[num:size].zero_()
        rows = [(part.rows.num, part.rows.stop) for part in parts]
        table = self._how.fixed_tiles(rows, size=size, room=tiles.shape[1])
        tiles.copy_(to_device(torch.from_numpy(table), tiles.device), non_blocking=True)
        view = replay()
        keys = attention.keys_of(self._runner.attn_backend, view.layer, self._owners)
        return mass_of(view._replace(keys=keys), counts, asking)

    def _record(self, size: int, pool: Any) -> tuple[torch.Tensor, Callable[[], LayerView]]:
        """Its tiles, and what runs the layers for what is in the buffers."""
        room = size // self._how.tile_rows + MOST_REQUESTS + 1
        plan = self._how.fixed_plan(size, room, self._positions[:size], self._owners)
        (launch,) = plan.launches
        launch.tiles.copy_(torch.from_numpy(self._how.fixed_tiles([], size=size, room=room)))
        batch = self._batch(size)

        def run() -> LayerView:
            return _run(self._runner, batch, self._layer, plan)

        if pool is None:  # no graphs: the same layers over the same buffers, launched one by one
            return launch.tiles, run
        beside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):  # compiles what is compiled when first launched
            run()
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            view = run()

        def replay() -> LayerView:
            graph.replay()
            return view

        return launch.tiles, replay

    def _batch(self, size: int) -> Any:
        """One request of ``size`` tokens, over the buffers: only attention knows whose they are."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        with torch.device(self._runner.device):
            length = torch.full((1,), size, dtype=torch.int64)
            none = torch.zeros(1, dtype=torch.int32)
        batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=1,
            input_ids=self._ids[:size],
            req_pool_indices=self._owners[:1],
            seq_lens=length,
            out_cache_loc=self._slots[:size],
            seq_lens_sum=size,
            orig_seq_lens=length,
            seq_lens_cpu=torch.tensor([size]),
            positions=self._positions[:size],
            extend_num_tokens=size,
            extend_seq_lens=length.to(torch.int32),
            extend_prefix_lens=none,
            extend_start_loc=none,
            extend_prefix_lens_cpu=[0],
            extend_seq_lens_cpu=[size],
            extend_logprob_start_lens_cpu=[size],
            global_forward_mode=ForwardMode.EXTEND,
        )
        versions.set_num_tokens(batch, size)
        return batch


def record(
    runner: "ModelRunner", layer: int, *, sizes: Sequence[int] = SIZES
) -> TraceGraphs | None:
    """The recordings for a server that is starting; None where passes are launched layer by layer:
    where SGLang replays no prefill graphs either, or something goes wrong."""
    if not attention.has_kernel(runner) or layer == 0 or not _records(runner):
        return None
    started = time.perf_counter()
    try:
        graphs = TraceGraphs(runner, layer, sizes)
    except Exception:
        logger.exception("KVShare could not record traced passes; they run layer by layer")
        return None
    seconds = time.perf_counter() - started
    logger.info(
        "KVShare: traced passes of up to %d rows are recorded (%d sizes, %.1f s)",
        max(sizes), len(sizes), seconds,
    )  # fmt: skip
    return graphs


def _records(runner: "ModelRunner") -> bool:
    """Whether graphs are wanted, and what they hold stays in place and on one device."""
    args = runner.server_args
    if args.tp_size * args.pp_size > 1 or args.enable_lora or args.enable_memory_saver:
        return False
    prefill = getattr(runner, "prefill_cuda_graph_runner", None)
    return getattr(prefill, "prefill_backend_name", None) == "breakable"


class _Keep:
    """Keeps what the probe layer shows, and stops the pass."""

    narrows = False

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.view: LayerView | None = None

    def observe(self, view: LayerView) -> Stop:
        self.view = view
        return STOP


def _run(runner: "ModelRunner", batch: Any, layer: int, plan: Any) -> LayerView:
    """Run the batch up to the layer, eagerly; what that shows."""
    state, keep = runner.attn_backend.kvshare, _Keep(layer)
    state.batch, state.plan = BatchReuse(rows=(), observer=keep), plan
    try:
        with torch.no_grad(), contextlib.suppress(StopForward):
            versions.run_model(runner, batch)
    finally:
        state.batch = state.plan = None
    assert keep.view is not None
    return keep.view
