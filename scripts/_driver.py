"""A dense Llama in plain torch, over the plug-in's own planner and kernels: for sweeps of quality.

It runs the rows that the server would run (``tests/test_driver.py`` holds the two together) and
lets a check layer choose the rest: up to that layer every reused row runs; there its fresh K and V
are compared with the cached ones, and the layers behind run the chosen rows only.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _mirror import Mirror

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.kernels import deviation, partial_attn, rope_shift
from kvshare_sglang.policy import rows as selectors
from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.policy.trace import Trace, probe_layer
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.types import ReusePlan


class KV(NamedTuple):
    """K (rotated) and V of one sequence: [layers, tokens, kv_heads, dim] each."""

    k: torch.Tensor
    v: torch.Tensor


class Partial(NamedTuple):
    """A prefill with reuse: logits of the last token [vocab], the KV it left, rows by layer."""

    logits: torch.Tensor
    kv: KV
    rows: list[np.ndarray]  # positions, by layer
    check: selectors.Check | None
    probed: tuple[np.ndarray, ...] = ()  # positions that ran up to the probe layer before
    open_rows: np.ndarray | None = None  # bool [prompt]: copied, and not chosen by the trace


class Model:
    """Llama, Qwen2, Qwen3 or Mistral from a Hugging Face directory."""

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        self.config = loaded.config.to_dict()
        self.device, self.dtype = device, dtype
        body = loaded.model
        self.layers = list(body.layers)
        self.embed, self.norm, self.head = body.embed_tokens, body.norm, loaded.lm_head
        attn = self.layers[0].self_attn
        self.dim = attn.head_dim
        self.heads = attn.q_proj.out_features // self.dim
        self.kv_heads = attn.k_proj.out_features // self.dim
        self.scaling = attn.scaling
        limit = int(loaded.config.max_position_embeddings)
        cos, sin = body.rotary_emb(torch.zeros(1, dtype=torch.float32, device=device),
                                   torch.arange(limit, device=device)[None])  # fmt: skip
        half = cos.shape[-1] // 2
        self.table = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).float()

    # ---- one layer ---------------------------------------------------------------------------

    def _qkv(self, layer: Any, x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
        attn = layer.self_attn
        h = layer.input_layernorm(x)
        q = attn.q_proj(h).view(len(x), -1, self.dim)
        k = attn.k_proj(h).view(len(x), -1, self.dim)
        v = attn.v_proj(h).view(len(x), -1, self.dim)
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        return self._turn(q, at), self._turn(k, at), v

    def _turn(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cos, sin = self.table[at, None].chunk(2, dim=-1)
        return rope_shift.rotate_keys(x, rope_shift.Shift(cos, sin), is_neox=True)

    def _behind(self, layer: Any, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        x = x + layer.self_attn.o_proj(seen.flatten(1))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def _attend(self, q: torch.Tensor, at: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        plan = partial_attn.plan(
            [(at, torch.arange(len(k)))], group=self.heads // self.kv_heads, dtype=q.dtype
        )
        return partial_attn.run(plan, q, k, v, scaling=self.scaling)

    # ---- prefill -----------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self,
        ids: Tokens,
        kv: KV,
        rows: np.ndarray,
        *,
        check_layer: int = -1,
        choose: Callable[..., np.ndarray] | None = None,
    ) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Run ``rows`` (positions, ascending) over ``kv``, in place; hidden states of the last
        layer's rows, normed, and the rows by layer.

        At ``check_layer`` ``choose(q, k, v, at, layer)`` says which of the rows go on.
        """
        at = torch.as_tensor(rows, device=self.device)
        x = self.embed(torch.as_tensor(ids[rows], device=self.device).long())
        by_layer = []
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, at)
            if i == check_layer and choose is not None:
                keep = torch.as_tensor(choose(q, k, v, at, i), device=self.device)
                kv.k[i, at], kv.v[i, at] = k, v  # all that was computed here is kept
                x, at, q = x[keep], at[keep], q[keep]
            else:
                kv.k[i, at], kv.v[i, at] = k, v
            x = self._behind(layer, x, self._attend(q, at, kv.k[i], kv.v[i]))
            by_layer.append(at.cpu().numpy())
        return self.norm(x), by_layer

    @torch.no_grad()
    def peek(self, ids: Tokens, kv: KV, rows: np.ndarray, layer: int) -> torch.Tensor:
        """Run ``rows`` up to ``layer``, their K and V in place; their queries there, rotated."""
        at = torch.as_tensor(rows, device=self.device)
        x = self.embed(torch.as_tensor(ids[rows], device=self.device).long())
        for i, block in enumerate(self.layers[: layer + 1]):
            q, k, v = self._qkv(block, x, at)
            kv.k[i, at], kv.v[i, at] = k, v
            if i < layer:
                x = self._behind(block, x, self._attend(q, at, kv.k[i], kv.v[i]))
        return q

    def room(self, tokens: int) -> KV:
        shape = (len(self.layers), tokens, self.kv_heads, self.dim)
        return KV(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))

    def full(self, ids: Tokens) -> tuple[torch.Tensor, KV]:
        """Logits of the last token and the KV of full prefill."""
        kv = self.room(len(ids))
        hidden, _ = self.run(ids, kv, np.arange(len(ids)))
        return self.logits(hidden[-1]), kv

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden).float()

    @torch.no_grad()
    def go_on(self, kv: KV, ids: Tokens, *, known: int) -> torch.Tensor:
        """Logits [n, vocab] behind each of ``ids[known:]``, over the KV of ``ids[:known]``.

        Uses what room ``kv`` has behind; what is there is overwritten.
        """
        if kv.k.shape[1] < len(ids):
            kv = self.widened(kv, len(ids), known=known)
        hidden, _ = self.run(ids, kv, np.arange(known, len(ids)))
        return self.logits(hidden)

    def widened(self, kv: KV, tokens: int, *, known: int) -> KV:
        """A copy of the first ``known`` tokens with room for ``tokens``."""
        wide = self.room(tokens)
        wide.k[:, :known], wide.v[:, :known] = kv.k[:, :known], kv.v[:, :known]
        return wide

    def greedy(self, ids: Tokens, first: torch.Tensor, kv: KV, count: int) -> Tokens:
        """The prompt and ``count`` tokens behind it, from its KV and the logits of its last."""
        out = np.concatenate([ids, np.zeros(count, ids.dtype)])
        kv = self.widened(kv, len(out), known=len(ids))
        logits = first
        for n in range(len(ids), len(out)):
            out[n] = int(logits.argmax())
            if n + 1 < len(out):
                logits = self.go_on(kv, out[: n + 1], known=n)[-1]
        return out


class Lab:
    """A cache of exact prompts without limits, and prefill with reuse from it."""

    def __init__(self, model: Model, config: KVShareConfig) -> None:
        self.model, self.config = model, config
        self.mirror = Mirror()
        self._kv: list[KV] = []

    def add(self, ids: Tokens, kv: KV | None = None) -> None:
        """Cache a prompt, with the KV of full prefill where none is given."""
        self.mirror.add(ids)
        self._kv.append(self.model.full(ids)[1] if kv is None else kv)

    def plan(self, ids: Tokens) -> ReusePlan:
        return self.mirror.plan(ids, self.config)

    def copied(self, ids: Tokens, plan: ReusePlan, *, room: int = 0) -> KV:
        """KV with the exact prefix and every run in place, K re-rotated; zeros elsewhere, and in
        the ``room`` behind the prompt."""
        model = self.model
        kv = model.room(len(ids) + room)
        if plan.prefix_len:
            source = self._kv[self.mirror.prefix_owner(ids)]
            kv.k[:, : plan.prefix_len] = source.k[:, : plan.prefix_len]
            kv.v[:, : plan.prefix_len] = source.v[:, : plan.prefix_len]
        for run in plan.runs:
            source = self._kv[self.mirror.owner(run)]
            new = torch.arange(run.dst_start, run.dst_stop, device=model.device)
            old = new - run.shift
            shift = rope_shift.plan_shift(model.table, old, new)
            for layer in range(len(model.layers)):
                kv.k[layer, new] = rope_shift.rotate_keys(source.k[layer, old], shift, is_neox=True)
                kv.v[layer, new] = source.v[layer, old]
        return kv

    def prefill(
        self, ids: Tokens, plan: ReusePlan, selector: str, *, budget: float, check_layer: int = 1,
        seed: int = 0, truth: KV | None = None, room: int = 0,
    ) -> Partial:  # fmt: skip
        """Prefill with ``selector`` choosing the reused rows that run behind ``check_layer``.

        ``oracle`` chooses by the true deviation over all layers, and needs full prefill's KV.
        """
        wish = selectors.Wish(plan, budget, self.config.seam, self.config.window, seed=seed)
        kv = self.copied(ids, plan, room=room)
        found: list[selectors.Check] = []
        if selector == "oracle":
            assert truth is not None
            found.append(self._truth(plan, kv, truth))
            ranges = selectors.compute("deviation", wish._replace(check=found[0]))
            rows = positions(ranges)
            hidden, by_layer = self.model.run(ids, kv, rows)
        elif selector in selectors.CHECKED:
            every = np.arange(plan.prefix_len, plan.prompt_len)

            def choose(q: Any, k: Any, v: Any, at: Any, layer: int) -> np.ndarray:
                found.append(self._check(plan, kv, q, k, v, at, layer))
                asked = wish._replace(check=found[0])
                if selector == "dhd":
                    asked = selectors.without_far_runs(asked, limit=self.config.tau)
                return positions(selectors.compute(selector, asked)) - plan.prefix_len

            hidden, by_layer = self.model.run(
                ids, kv, every, check_layer=check_layer, choose=choose
            )
        elif selector == "trace":
            trace = Trace.of_plan(plan, budget=budget, seam=self.config.seam)
            probed = self._follow(trace, ids, kv)
            must = selectors.must_run(plan, suffix=self.config.seam)
            hidden, by_layer = self.model.run(ids, kv, np.union1d(must, trace.chosen))
            logits = self.model.logits(hidden[-1])
            return Partial(logits, kv, by_layer, None, probed, trace.open_rows)
        else:
            rows = positions(selectors.compute(selector, wish))
            hidden, by_layer = self.model.run(ids, kv, rows)
        return Partial(self.model.logits(hidden[-1]), kv, by_layer, found[0] if found else None)

    @property
    def _probe(self) -> int:
        return probe_layer(len(self.model.layers), self.config.probe_at)

    def _follow(self, trace: Trace, ids: Tokens, kv: KV) -> tuple[np.ndarray, ...]:
        """Take a trace to its end; the rows that ran for it, by step."""
        probed = []
        while not trace.done:
            probed.append(trace.rows)
            trace.feed(self._reads(ids, kv, trace.rows, trace.asking)[: trace.length])
        return tuple(probed)

    def _reads(self, ids: Tokens, kv: KV, rows: np.ndarray, asking: np.ndarray) -> np.ndarray:
        """Run ``rows`` up to the probe layer; what ``asking``, the last of them, pay there to each
        position."""
        layer = self._probe
        q = self.model.peek(ids, kv, rows, layer)[-len(asking) :]
        at = torch.as_tensor(asking, device=q.device)
        keys = kv.k[layer, : int(asking[-1]) + 1]
        scaling = self.model.scaling
        paid = deviation.attention_paid(q, at, keys, scaling=scaling, strongest_head=True)
        return np.pad(paid.cpu().numpy(), (0, len(ids) - len(paid)))

    def decode(
        self, ids: Tokens, known: int, done: Partial, *, every: int
    ) -> tuple[torch.Tensor, int]:
        """Logits [n, vocab] behind each of ``ids[known:]``, fed one by one with refresh as the
        server does it, and how many rows were refreshed. ``every``: as --kvshare-refresh-every."""
        assert done.open_rows is not None
        model, config = self.model, self.config
        kv = model.widened(done.kv, len(ids), known=known)
        watch = Watch(done.open_rows.copy())
        out, count = [], 0
        for n in range(known, len(ids)):
            here = np.arange(n, n + 1)
            if every and not watch.over and watch.due():
                paid = self._reads(ids, kv, here, here)[:known]
                if watch.wants(paid, above=config.refresh_above):
                    count += self._refresh(ids, kv, watch, paid, every)
            hidden, _ = model.run(ids, kv, here)
            out.append(model.logits(hidden[-1]))
        return torch.stack(out) if out else done.logits[:0].view(0, len(done.logits)), count

    def _refresh(self, ids: Tokens, kv: KV, watch: Watch, paid: np.ndarray, every: int) -> int:
        config = self.config
        layer = self._probe
        none = np.empty(0, np.int64)
        trace = Trace(watch.open, rows=none, asking=none, count=config.refresh_rows)
        trace.feed(paid)
        before = kv.v[layer].clone()
        self._follow(trace, ids, kv)
        rows = trace.chosen
        self.model.run(ids, kv, rows)
        at = torch.as_tensor(rows, device=before.device)
        far = float(deviation.deviation(kv.v[layer, at], before[at]).mean())
        watch.refreshed(rows, far=far, pause=every, unchanged=config.refresh_unchanged)
        return len(rows)

    def _check(
        self, plan: ReusePlan, kv: KV, q: Any, k: Any, v: Any, at: Any, layer: int
    ) -> selectors.Check:
        """All rows behind the prefix are here: compare the reused ones with what was copied."""
        where = selectors.reused_positions(plan)
        here = torch.as_tensor(where - plan.prefix_len, device=q.device)
        slots = torch.as_tensor(where, device=q.device)
        rows = selectors.asking_rows(plan, seam=self.config.seam)
        asking = torch.arange(rows.start - plan.prefix_len, rows.stop - plan.prefix_len)
        keys = kv.k[layer, : plan.prompt_len].clone()
        keys[at] = k  # every row is fresh in this layer
        paid = deviation.attention_paid(q[asking], at[asking], keys, scaling=self.model.scaling)
        return selectors.Check(
            where,
            deviation.deviation(k[here], kv.k[layer, slots]).cpu().numpy(),
            deviation.deviation(v[here], kv.v[layer, slots]).cpu().numpy(),
            paid[slots].cpu().numpy(),
        )

    def _truth(self, plan: ReusePlan, kv: KV, truth: KV) -> selectors.Check:
        where = selectors.reused_positions(plan)
        at = torch.as_tensor(where)
        k, v = (
            torch.stack(
                [deviation.deviation(t[at], c[at]) for t, c in zip(true, mine, strict=True)]
            ).mean(dim=0).cpu().numpy()
            for true, mine in ((truth.k, kv.k), (truth.v, kv.v))
        )  # fmt: skip
        return selectors.Check(where, k, v, np.ones(len(where), np.float32))


def positions(ranges: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.arange(r.start, r.stop) for r in ranges])
