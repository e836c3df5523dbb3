"""SGLang's fa3 and flashinfer backends on a CPU: they plan and call; recorders stand for kernels.

A recorder says which keys its kernel would read for each query, by what the kernel's own
documentation says of its arguments. A key holds the number of its slot, and a query that of its
row's slot, so what is seen is read off the tensors that were handed over, not off our own plan.
"""

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from kvshare_sglang.runtime import attention

HEADS, DIM = 2, 16  # one KV head
CONTEXT = 256  # tokens of a request
REQUESTS = 12  # that may run, and rows of the page table but one
STALE = -1.0  # what a slot holds that nothing was written to
GATHER = "create_flashinfer_kv_indices_triton"


class Seen:
    """By the slot of a row: the slots that it sees, once for each time that it does."""

    def __init__(self) -> None:
        self.slots: dict[int, list[int]] = defaultdict(list)
        self.merges = self.launches = 0

    def note(self, q: torch.Tensor, keys: list[torch.Tensor]) -> None:
        """``keys`` [any, kv_heads, dim]: by query of ``q`` [rows, heads, dim]."""
        assert len(q) == len(keys)
        self.launches += 1
        for row, seen in zip(q, keys, strict=True):
            self.slots[int(row[0, 0])] += seen[:, 0, 0].int().tolist()

    def merge(self, o1: Any, s1: Any, o2: Any, s2: Any) -> tuple[Any, Any]:
        """Of two results for the same rows."""
        self.merges += 1
        return o1, s1


def visible(keys: Iterable[torch.Tensor], rows: Any, *, causal: bool) -> list[torch.Tensor]:
    """By query, the keys it sees. By request: its ``keys``, and queries between two of ``rows``.
    FA3 and FlashInfer align the mask with the end of the keys."""
    out = []
    for mine, (start, stop) in zip(keys, pairwise(rows.tolist()), strict=True):
        hidden = range(stop - start - 1, -1, -1) if causal else [0] * (stop - start)
        out += [mine[: len(mine) - some] for some in hidden]
    return out


class FA3:
    """``flash_attn_with_kvcache``."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def __call__(
        self, *, q: Any, k_cache: Any, page_table: Any, cache_seqlens: Any, cu_seqlens_q: Any,
        max_seqlen_q: int, causal: bool, window_size: tuple[int, int], **kw: Any,
    ) -> torch.Tensor:  # fmt: skip
        assert window_size == (-1, -1)
        assert page_table.dtype == cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
        assert len(page_table) == len(cache_seqlens) == len(cu_seqlens_q) - 1
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        mine = [
            k_cache[pages.long()].flatten(0, 1)[:length]
            for pages, length in zip(page_table, cache_seqlens.tolist(), strict=True)
        ]
        self._seen.note(q, visible(mine, cu_seqlens_q, causal=causal))
        return torch.zeros_like(q)


class Wrapper:
    """FlashInfer's wrappers of prefill and decode: a plan, and a call for each layer."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        self._plan: Callable[..., list[torch.Tensor]] | None = None
        self.seen: Seen | None = None

    def note(self, q: Any, *kv: Any, causal: bool, window_left: int = -1, **kw: Any) -> Any:
        assert self._plan is not None
        assert self.seen is not None
        assert window_left == -1
        self.seen.note(q, self._plan(*kv, causal=causal))
        return torch.zeros_like(q)

    forward = note

    def forward_return_lse(self, q: Any, *kv: Any, **kw: Any) -> Any:
        return self.note(q, *kv, **kw), torch.zeros(q.shape[:2])


class Paged(Wrapper):
    """``BatchPrefillWithPagedKVCacheWrapper``, with pages of one token."""

    def begin_forward(
        self, qo: Any, kv: Any, indices: Any, last_page: Any, heads: int, kv_heads: int, dim: int,
        page_size: int, custom_mask: Any = None, **kw: Any,
    ) -> None:  # fmt: skip
        assert (heads, kv_heads, dim, page_size, custom_mask) == (HEADS, 1, DIM, 1, None)
        assert last_page.tolist() == [1] * (len(qo) - 1)
        # It reads them at once; the next batch writes over the buffers.
        rows, indices = qo.clone(), indices.clone().long()
        spans = list(pairwise(kv.tolist()))

        def keys_of(cache: Any, *, causal: bool) -> list[torch.Tensor]:
            return visible([cache[0][indices[a:b]] for a, b in spans], rows, causal=causal)

        self._plan = keys_of


class Ragged(Wrapper):
    """``BatchPrefillWithRaggedKVCacheWrapper``: keys are handed over, as queries are."""

    def begin_forward(
        self, qo: Any, kv: Any, heads: int, kv_heads: int, dim: int, **kw: Any
    ) -> None:
        assert (heads, kv_heads, dim) == (HEADS, 1, DIM)
        rows, spans = qo.clone(), list(pairwise(kv.tolist()))

        def keys_of(k: Any, v: Any, *, causal: bool) -> list[torch.Tensor]:
            assert len(k) == len(v) == spans[-1][1]
            return visible([k[a:b] for a, b in spans], rows, causal=causal)

        self._plan = keys_of


class Gather:
    """SGLang's kernel that lists slots of requests one after the other, launched over requests."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def fill(
            table: Any, owners: Any, lengths: Any, indptr: Any, first: Any, out: Any, *rest: Any,
            **kw: Any,
        ) -> None:  # fmt: skip
            assert first is None
            assert grid[0] == len(lengths)
            spans = pairwise(indptr.tolist())
            for owner, length, (a, b) in zip(owners, lengths.tolist(), spans, strict=True):
                out[a : a + length] = table[owner, :length]
                assert b - a == length

        return fill


@contextmanager
def runners() -> Iterator[Callable[[str, int], SimpleNamespace]]:
    """``runner(name, page)``: what a backend of SGLang reads of a ModelRunner, with that backend,
    wrapped by us. What SGLang imports from GPU packages is not needed while this is open."""
    with ExitStack() as stack:
        import sgl_kernel
        from sglang.srt.runtime_context import get_context, get_parallel

        stack.enter_context(get_context().override_server_args(device="cpu"))
        stack.enter_context(get_parallel().override(attn_tp_size=1, attn_cp_size=1))
        kernels = ModuleType("sgl_kernel.flash_attn")
        for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata"):
            setattr(kernels, name, None)
        stack.enter_context(mock.patch.dict(sys.modules, {kernels.__name__: kernels}))
        stack.enter_context(mock.patch.object(sgl_kernel, "merge_state_v2", None, create=True))
        from sglang.srt.layers.attention import flashattention_backend, flashinfer_backend

        wrappers = {
            "BatchPrefillWithPagedKVCacheWrapper": Paged,
            "BatchPrefillWithRaggedKVCacheWrapper": Ragged,
            "BatchDecodeWithPagedKVCacheWrapper": Wrapper,
        }
        stack.enter_context(mock.patch.multiple(flashinfer_backend, create=True, **wrappers))
        for module in list(sys.modules.values()):  # wherever this version calls it from
            if getattr(module, "__name__", "").startswith("sglang.") and hasattr(module, GATHER):
                stack.enter_context(mock.patch.object(module, GATHER, Gather()))
        classes = {
            "fa3": flashattention_backend.FlashAttentionBackend,
            "paged": flashinfer_backend.FlashInferAttnBackend,
            "ragged": flashinfer_backend.FlashInferAttnBackend,
        }

        def make(name: str, page: int) -> SimpleNamespace:
            runner = _runner(page)
            runner.attn_backend = backend = classes[name](runner)
            if name != "fa3":
                backend.use_paged = name == "paged"
            attention.wrap(backend, runner)
            return runner

        yield make


def record(runner: SimpleNamespace, stack: ExitStack) -> Seen:
    """What the runner's backend lets its kernels see, until the stack is left."""
    from sglang.srt.layers.attention import flashattention_backend, flashinfer_backend

    seen = Seen()
    calls = {"flash_attn_with_kvcache": FA3(seen)}
    stack.enter_context(mock.patch.multiple(flashattention_backend, **calls))
    merge = mock.patch.object(flashinfer_backend, "_safe_merge_state", seen.merge, create=True)
    stack.enter_context(merge)
    for wrapper in vars(runner.attn_backend).values():
        for one in wrapper if isinstance(wrapper, list) else [wrapper]:
            if isinstance(one, Wrapper):
                one.seen = seen
    return seen


def layer() -> Any:
    from sglang.srt.layers.radix_attention import RadixAttention

    return RadixAttention(HEADS, DIM, DIM**-0.5, num_kv_heads=1, layer_id=0)


def _runner(page: int) -> SimpleNamespace:
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.runtime_context import get_context

    pool = MHATokenToKVPool(
        (REQUESTS + 1) * CONTEXT, page, torch.float32, 1, DIM, 1, "cpu", enable_memory_saver=False
    )
    rows = ReqToTokenPool(REQUESTS, CONTEXT, "cpu", enable_memory_saver=False)
    model = SimpleNamespace(
        context_len=CONTEXT, head_dim=DIM, v_head_dim=DIM, num_attention_heads=HEADS,
        is_encoder_decoder=False, is_multimodal=False, is_local_attention_model=False,
        attention_arch=AttentionArch.MHA, hf_config=SimpleNamespace(architectures=["Llama"]),
        hf_text_config=SimpleNamespace(num_attention_heads=HEADS),
        get_num_kv_heads=lambda *widths: 1, get_max_num_attention_heads=lambda: HEADS,
    )  # fmt: skip
    runner = SimpleNamespace(
        model_config=model, device="cpu", dtype=torch.float32, kv_cache_dtype=torch.float32,
        kv_cache_dtype_str="auto", page_size=page, sliding_window_size=None, is_draft_worker=False,
        req_to_token_pool=rows, token_to_kv_pool=pool, max_running_requests=REQUESTS,
        server_args=get_context().server_args, prefill_attention_backend_str="",
        decode_attention_backend_str="", attention_chunk_size=None, attn_cp_size=1,
        ps=SimpleNamespace(attn_cp_size=1, attn_tp_size=1, tp_size=1),  # of 0.5.17
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
    )  # fmt: skip
    if importlib.util.find_spec("sglang.srt.mem_cache.kv_index_translator"):  # not in 0.5.17
        from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator

        runner.kv_index_translator = KVIndexTranslator(
            req_to_token=rows.req_to_token, token_to_kv_pool=pool, page_size=page, device="cpu",
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        )  # fmt: skip
    return runner
