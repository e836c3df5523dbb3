"""Attention for partial batches, in front of whatever backend SGLang built; knows no selector.

SGLang's own wrapper of a backend (``TboAttnBackend``) is a class with the backend inside, which
must hand on every attribute that SGLang reads of a backend. Here a class is made over the backend's
own, so that all else of it stays what it is, on every version.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.kernels import ops, partial_attn
from kvshare_sglang.plan import Rows
from kvshare_sglang.runtime.batch import (
    BatchReuse,
    LayerView,
    Stop,
    StopForward,
    cut_tokens,
    on_host,
    put_tokens,
    runs_as_rows,
)

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclass
class BackendReuse:
    """What a backend carries as ``backend.kvshare``.

    ``batch``: of the forward pass that runs now, None between passes. Partial batches are attended
    by ``how``: the kernel for GPUs, or "blocks", torch's blocks on a CPU; or None: the backend
    itself, seeing ranges of rows as requests. ``plan``: what any of them needs for this batch.
    ``recorded``: traced passes that can be replayed, if any. ``profiles``: what rows attend to, if
    that is kept. ``watches_entry``: whether a layer is
    looked at as it is entered. ``carries``: whether new text is carried on; not again once that
    failed.
    """

    runner: "ModelRunner"
    how: ops.Attention | str | None
    batch: BatchReuse | None = None
    plan: Any = None
    cuts_layers: bool = False
    watches_entry: bool = False
    carries: bool = True
    recorded: Any = None
    profiles: Any = None

    @property
    def own(self) -> bool:
        """Whether attention is ours: then rows may lie in any number of ranges."""
        return self.how is not None


def partial_class(kind: Any) -> type:
    """A subclass of the backend class ``kind`` that attends for partial batches too."""

    class PartialAttention(kind):  # type: ignore[misc]
        kvshare: BackendReuse

        def init_forward_metadata(self, fb: "ForwardBatch") -> Any:
            state = self.kvshare
            rows = state.batch.rows if state.batch else None
            state.plan = None
            if rows is not None and isinstance(state.how, ops.Attention):
                counts = [(one.num, one.stop) for one in rows]
                state.plan = state.how.plan(counts, fb.positions, fb.req_pool_indices)
                return None  # nothing of the backend's own runs
            if rows is not None and state.own:
                state.plan = _blocks(self, fb, on_host(rows))
            elif rows is not None:
                fb = state.plan = runs_as_rows(fb, on_host(rows))
            return super().init_forward_metadata(fb)

        def forward_extend(
            self, q: Any, k: Any, v: Any, layer: "RadixAttention", fb: "ForwardBatch",
            save_kv_cache: bool = True, **kw: Any,
        ) -> Any:  # fmt: skip
            state = self.kvshare
            if state.batch is None or state.batch.rows is None:
                out = super().forward_extend(q, k, v, layer, fb, save_kv_cache=save_kv_cache, **kw)
                _profile(self, q, layer, fb)
                return out
            pool = self.token_to_kv_pool
            if save_kv_cache and k is not None:
                k, v = _store(pool, k, v, layer, fb)
            keep = _observe(self, q, k, v, layer, fb)
            if keep is not None:
                q, k, v = q[keep], k[keep], v[keep]  # backends read fresh K and V from here
            _profile(self, q, layer, fb)
            if not state.own:
                return super().forward_extend(q, k, v, layer, state.plan, save_kv_cache=False, **kw)
            q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
            keys = pool.get_key_buffer(layer.layer_id)
            values = pool.get_value_buffer(layer.layer_id)
            if isinstance(state.how, ops.Attention):
                table = self.req_to_token_pool.req_to_token
                scales = _scales(layer, keys)
                out = state.how.run(
                    state.plan, q, keys, values, table, scaling=layer.scaling, **scales
                )
            else:
                out = partial_attn.run(state.plan, q, keys, values, scaling=layer.scaling)
            return out.flatten(1)

        def forward_decode(
            self, q: Any, k: Any, v: Any, layer: "RadixAttention", fb: "ForwardBatch",
            save_kv_cache: bool = True, **kw: Any,
        ) -> Any:  # fmt: skip
            out = super().forward_decode(q, k, v, layer, fb, save_kv_cache=save_kv_cache, **kw)
            _observe(self, q, None, None, layer, fb)
            return out

    PartialAttention.__name__ = f"Partial{kind.__name__}"
    return PartialAttention


def wrap(backend: "AttentionBackend", runner: "ModelRunner") -> None:
    """Let ``backend`` attend for partial batches; whole ones it serves as before."""
    # It pads each row to the full length.
    how = "blocks" if type(backend).__name__ == "TorchNativeAttnBackend" else None
    backend.__class__ = partial_class(type(backend))
    backend.kvshare = BackendReuse(runner, how)


def has_kernel(runner: "ModelRunner") -> bool:
    """Whether partial batches are attended by the kernel for GPUs."""
    return isinstance(runner.attn_backend.kvshare.how, ops.Attention)


def choose_kernel(runner: "ModelRunner", config: KVShareConfig) -> None:
    """Use the kernel for GPUs where there is one for this model and device, and compile it, so that
    no request waits. Once the model is known to be served."""
    state: BackendReuse = runner.attn_backend.kvshare
    if state.how is not None or config.attention == "backend":
        return
    attn = runner.model.model.layers[0].self_attn.attn
    how = ops.attention(
        runner.device,
        runner.dtype,
        heads=attn.tp_q_head_num,
        kv_heads=attn.tp_k_head_num,
        dim=attn.qk_head_dim,
        v_dim=attn.v_head_dim,
    )
    if how is not None:
        pool, table = runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
        keys, values = pool.get_key_buffer(attn.layer_id), pool.get_value_buffer(attn.layer_id)
        try:
            how.warm_up(runner.dtype, keys, values, table, **_scales(attn, keys))
        except Exception:
            logger.exception("KVShare's attention kernel does not run here")
            how = None
    state.how = how
    backend = type(runner.attn_backend).__mro__[1].__name__
    who = "KVShare's kernel" if how else f"{backend}, by ranges,"
    logger.info("KVShare: %s attends for rows that lie apart", who)


def _scales(layer: "RadixAttention", keys: torch.Tensor) -> dict[str, float]:
    """What a cache of 8 bits is multiplied by."""
    if keys.dtype.itemsize > 1:
        return {}
    names = (("k_scale", "k_scale_float"), ("v_scale", "v_scale_float"))
    found = {name: getattr(layer, field, None) for name, field in names}
    return {name: 1.0 if scale is None else float(scale) for name, scale in found.items()}


def _store(
    pool: Any, k: torch.Tensor, v: torch.Tensor, layer: "RadixAttention", fb: "ForwardBatch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put K and V of all rows in the pool before attention: later rows see what earlier rows wrote
    in this layer. Returns them by head."""
    k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
    v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
    scales = (getattr(layer, "k_scale", None), getattr(layer, "v_scale", None))
    if any(scale is not None for scale in scales):
        k, v = k.clone(), v.clone()  # the pool divides by the scales in place
    pool.set_kv_buffer(layer, fb.out_cache_loc, k, v, *scales)
    return k, v


def _observe(
    backend: Any, q: Any, k: Any, v: Any, layer: "RadixAttention", fb: "ForwardBatch"
) -> torch.Tensor | None:
    """Show the layer to the batch's observer, if it is the one. Returns which of the batch's
    tokens go on, None for all. Raises StopForward."""
    batch = backend.kvshare.batch
    observer = batch.observer if batch else None
    if observer is None or layer.layer_id != observer.layer:
        return None
    keys = keys_of(backend, layer, fb.req_pool_indices)
    q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
    found = observer.observe(LayerView(layer, q, k, v, keys, layer.scaling))
    if isinstance(found, Stop):
        raise StopForward
    return None if found is None else _narrow(backend, fb, batch, found)


def _profile(backend: Any, q: torch.Tensor, layer: "RadixAttention", fb: "ForwardBatch") -> None:
    """Note what the batch's rows attend to, in the layer where that is kept; K of the batch is in
    the pool. Rows of a trace's pass run again, but for new text that is carried on. A fault ends it
    for the server, and nothing else."""
    state: BackendReuse = backend.kvshare
    batch = state.batch
    if state.profiles is None or layer.layer_id != state.profiles.layer:
        return
    if batch is not None and batch.observer is not None and batch.entry is None:
        return
    try:
        if state.profiles.how is not None:
            _profile_paged(backend, q, layer, fb)
            return
        if batch is None or batch.rows is None:
            lengths = zip(fb.extend_prefix_lens_cpu, fb.extend_seq_lens_cpu, strict=True)
            places = [torch.arange(start, start + length) for start, length in lengths]
        else:
            places = [torch.from_numpy(one.positions) for one in on_host(batch.rows)]
        keys = keys_of(backend, layer, fb.req_pool_indices)
        rows = [(at, keys(i, int(at[-1]) + 1)) for i, at in enumerate(places) if len(at)]
        state.profiles.note(q, layer, fb.out_cache_loc, rows)
    except Exception:
        state.profiles.give_up()


def _profile_paged(
    backend: Any, q: torch.Tensor, layer: "RadixAttention", fb: "ForwardBatch"
) -> None:
    """As ``_profile``, by the kernel, which needs no row on the host."""
    batch = backend.kvshare.batch
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # what it would be recorded with holds for one batch
    if batch is None or batch.rows is None:
        lengths = zip(fb.extend_seq_lens_cpu, fb.extend_prefix_lens_cpu, strict=True)
        rows = [(length, start + length) for length, start in lengths]
    else:
        rows = [(one.num, one.stop) for one in batch.rows]
    keys = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
    table = backend.req_to_token_pool.req_to_token
    backend.kvshare.profiles.note_paged(
        q, layer, fb.out_cache_loc, rows, fb.positions, fb.req_pool_indices, keys, table
    )


def keys_of(
    backend: Any, layer: "RadixAttention", owners: torch.Tensor
) -> Callable[[int, int], torch.Tensor]:
    """``keys(i, n)`` of a ``LayerView``; ``owners``: the requests' rows of the page table."""
    buffer = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
    table = backend.req_to_token_pool.req_to_token

    def keys(i: int, n: int) -> torch.Tensor:
        # index_select: on CPU four times as fast as indexing. A slice, not a number, of what is on
        # the device: for a number the host would wait.
        return buffer.index_select(0, table[owners[i : i + 1], :n][0])

    return keys


def _narrow(
    backend: Any, fb: "ForwardBatch", batch: BatchReuse, rows: Sequence[Rows]
) -> torch.Tensor:
    """Cut the batch in mid-forward down to ``rows``."""
    assert batch.rows is not None
    state: BackendReuse = backend.kvshare
    if not state.cuts_layers:
        _cut_layers(state.runner.model.model.layers, state)
        state.cuts_layers = True
    batch.kept = cut_tokens(fb, on_host(batch.rows), rows, state.runner)
    batch.rows = list(rows)
    backend.init_forward_metadata(fb)
    return batch.kept


def _blocks(
    backend: Any, fb: "ForwardBatch", rows: Sequence[Rows]
) -> list[partial_attn.RequestRows]:
    attn = backend.kvshare.runner.model.model.layers[0].self_attn.attn
    table = backend.req_to_token_pool.req_to_token
    slots = [
        table[index, : one.stop].long()
        for index, one in zip(fb.req_pool_indices.tolist(), rows, strict=True)
    ]
    positions = [torch.from_numpy(np.asarray(one.positions)) for one in rows]
    group = attn.tp_q_head_num // attn.tp_k_head_num
    return partial_attn.plan(list(zip(positions, slots, strict=True)), group=group)


def watch_entry(runner: "ModelRunner", layer: int) -> None:
    """Let batches keep what enters a layer, and rows join there; once for a server.

    Decoder layers norm what comes in together with the residual, and hand positions to their
    attention by name, as in SGLang's Llama, Qwen2, Qwen3 and Mistral.
    """
    state: BackendReuse = runner.attn_backend.kvshare
    if state.watches_entry:
        return
    batches: list[Any] = []  # that the layer was called with

    def note_batch(module: Any, args: tuple[Any, ...]) -> None:
        batches.clear()
        if state.batch is not None and state.batch.wider is not None and len(args) > 2:
            batches.append(args[2])

    def enter(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        batch = state.batch
        if batch is None or len(args) < 2 or args[1] is None:
            return None
        hidden, residual, *rest = args
        if batch.entry is not None:
            batch.entry.hidden, batch.entry.residual = hidden.clone(), residual.clone()
        if (wider := batch.wider) is None or batch.joined or not batches:
            return None
        wider.hidden[wider.places], wider.residual[wider.places] = hidden, residual
        fb, batch.rows, batch.joined = batches.pop(), wider.rows, True
        put_tokens(fb, wider.tokens)
        runner.attn_backend.init_forward_metadata(fb)
        return (wider.hidden, wider.residual, *rest)

    def with_positions(module: Any, args: Any, kw: dict[str, Any]) -> tuple[Any, Any] | None:
        if state.batch is None or not state.batch.joined:
            return None
        return args, {**kw, "positions": kw["forward_batch"].positions}

    layers = runner.model.model.layers
    layers[layer].register_forward_pre_hook(note_batch)
    layers[layer].input_layernorm.register_forward_pre_hook(enter)
    layers[layer].self_attn.register_forward_pre_hook(with_positions, with_kwargs=True)
    _take_positions(layers[layer + 1 :], lambda: state.batch is not None and state.batch.joined)
    state.watches_entry = True


def _take_positions(layers: Any, changed: Callable[[], bool]) -> None:
    """Where a batch has changed in mid-forward, let layers go by its positions, not by those that
    the model calls them with."""

    def of_batch(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not changed():
            return None
        _, hidden, fb, *rest = args
        return (fb.positions, hidden, fb, *rest)

    for layer in layers:
        layer.register_forward_pre_hook(of_batch)


def _cut_layers(layers: Any, state: BackendReuse) -> None:
    """Make a model go on with the rows that an observer kept, in whatever layer that is.

    Its decoder layers are called with (positions, hidden states, batch, residual), and norm the
    residual together with what attention returned, as in SGLang's Llama, Qwen2, Qwen3 and Mistral.
    """

    def kept() -> torch.Tensor | None:
        return state.batch.kept if state.batch else None

    def cut_residual(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if kept() is None or len(args) < 2:
            return None
        hidden, residual, *rest = args
        if residual is None or len(hidden) == len(residual):
            return None
        return (hidden, residual[kept()], *rest)

    _take_positions(layers, lambda: kept() is not None)
    for layer in layers:
        layer.post_attention_layernorm.register_forward_pre_hook(cut_residual)
