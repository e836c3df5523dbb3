"""A dense Llama in plain torch over the plug-in's own selectors and kernels: sweeps of quality.

It runs the rows that the server would run (a test holds the two together). Selectors that see
scores: up to the check layer every reused row runs; there its fresh K and V are compared with the
cached ones, and the layers after it run the chosen rows only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.kernels import partial_attn, rope_shift, row_scores
from kvshare_sglang.plan import ReusePlan, Rows
from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.policy.select.attention_trace import AttentionTrace, Trace, probe_layer
from kvshare_sglang.policy.select.base import (
    RowScores,
    SelectionRequest,
    Selector,
    query_rows,
    required_rows,
)
from kvshare_sglang.policy.select.baselines import Structural, TopRows, baseline
from kvshare_sglang.policy.select.dependence import EDGES, outside
from kvshare_sglang.policy.select.dhd import Dhd
from kvshare_sglang.policy.select.window import Window
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.mirror import Mirror


class KV(NamedTuple):
    """K (rotated) and V of one sequence: [layers, tokens, kv_heads, dim] each."""

    k: torch.Tensor
    v: torch.Tensor


class Partial(NamedTuple):
    """A prefill with reuse: logits of the last token [vocab], the KV it left, rows by layer,
    and what it copied in the end."""

    logits: torch.Tensor
    kv: KV
    rows: list[np.ndarray]  # positions, by layer
    plan: ReusePlan
    scores: RowScores | None = None
    probed: tuple[np.ndarray, ...] = ()  # positions that ran up to the probe layer before


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

    def qkv(self, layer: Any, x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows ``x`` [n, hidden] at positions ``at`` to Q, K (both rotated) and V."""
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

    def after_attention(self, layer: Any, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The rest of a layer, given what each head of each row saw [n, heads, dim]."""
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
        watch: Callable[..., None] | None = None,
    ) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Run ``rows`` (positions, ascending) over ``kv``, in place; hidden states of the last
        layer's rows, normed, and the rows by layer. ``watch(layer, q, at)`` sees each.

        At ``check_layer`` ``choose(q, k, v, at, layer)`` says which of the rows go on.
        """
        at = torch.as_tensor(rows, device=self.device)
        x = self.embed(torch.as_tensor(ids[rows], device=self.device).long())
        by_layer = []
        for i, layer in enumerate(self.layers):
            q, k, v = self.qkv(layer, x, at)
            if i == check_layer and choose is not None:
                keep = torch.as_tensor(choose(q, k, v, at, i), device=self.device)
                kv.k[i, at], kv.v[i, at] = k, v  # all that was computed here is kept
                x, at, q = x[keep], at[keep], q[keep]
            else:
                kv.k[i, at], kv.v[i, at] = k, v
            if watch is not None:
                watch(i, q, at)
            x = self.after_attention(layer, x, self._attend(q, at, kv.k[i], kv.v[i]))
            by_layer.append(at.cpu().numpy())
        return self.norm(x), by_layer

    @torch.no_grad()
    def run_joined(
        self, ids: Tokens, kv: KV, rows: np.ndarray, *, layer: int,
        given: tuple[np.ndarray, torch.Tensor],
    ) -> tuple[torch.Tensor, list[np.ndarray]]:  # fmt: skip
        """As ``run``, but some rows join in ``layer``: ``given`` are their places among ``rows``
        and what enters it, [n, hidden]."""
        joins, entered = given
        below = np.delete(rows, joins)
        _, x = self.peek(ids, kv, below, layer)
        wide = x.new_empty((len(rows), x.shape[1]))
        wide[torch.from_numpy(np.delete(np.arange(len(rows)), joins))] = x
        wide[torch.from_numpy(joins)] = entered
        at = torch.as_tensor(rows, device=self.device)
        wide = self._through(wide, at, kv, layer, len(self.layers))
        by_layer = [below] * layer + [rows] * (len(self.layers) - layer)
        return self.norm(wide), by_layer

    @torch.no_grad()
    def peek(
        self, ids: Tokens, kv: KV, rows: np.ndarray, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run ``rows`` up to ``layer``, their K and V in place; their queries there, rotated, and
        what entered it."""
        at = torch.as_tensor(rows, device=self.device)
        x = self.embed(torch.as_tensor(ids[rows], device=self.device).long())
        x = self._through(x, at, kv, 0, layer)
        q, kv.k[layer, at], kv.v[layer, at] = self.qkv(self.layers[layer], x, at)
        return q, x

    def _through(
        self, x: torch.Tensor, at: torch.Tensor, kv: KV, start: int, stop: int
    ) -> torch.Tensor:
        """Rows ``x`` [n, hidden] at positions ``at`` through layers ``[start, stop)``."""
        for i, block in enumerate(self.layers[start:stop], start):
            q, kv.k[i, at], kv.v[i, at] = self.qkv(block, x, at)
            x = self.after_attention(block, x, self._attend(q, at, kv.k[i], kv.v[i]))
        return x

    @torch.no_grad()
    def reads(self, ids: Tokens, kv: KV, rows: np.ndarray) -> torch.Tensor:
        """Run ``rows``, their K and V in place; the attention that they pay to each position up to
        the last of them, mean over rows, heads and layers: fp32 [last + 1]."""
        at = torch.as_tensor(rows, device=self.device)
        x = self.embed(torch.as_tensor(ids[rows], device=self.device).long())
        stop = int(rows[-1]) + 1
        mass = torch.zeros(stop, device=self.device)
        for i, layer in enumerate(self.layers):
            q, k, v = self.qkv(layer, x, at)
            kv.k[i, at], kv.v[i, at] = k, v
            mass += row_scores.attention_mass(q, at, kv.k[i, :stop], scaling=self.scaling)
            x = self.after_attention(layer, x, self._attend(q, at, kv.k[i], kv.v[i]))
        return mass / len(self.layers)

    def room(self, tokens: int) -> KV:
        shape = (len(self.layers), tokens, self.kv_heads, self.dim)
        return KV(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))

    def full(self, ids: Tokens) -> tuple[torch.Tensor, KV]:
        """Logits of the last token and the KV of full prefill."""
        kv = self.room(len(ids))
        hidden, _ = self.run(ids, kv, np.arange(len(ids)))
        return self.logits(hidden[-1]), kv

    def profiled(self, ids: Tokens, layer: int) -> tuple[KV, np.ndarray]:
        """The KV of full prefill, and what each row attended to in the layer: [tokens, EDGES]."""
        kv = self.room(len(ids))
        found: list[torch.Tensor] = []

        def watch(number: int, q: torch.Tensor, at: torch.Tensor) -> None:
            if number == layer:
                edges = torch.tensor(EDGES, device=q.device)
                keys, scaling = kv.k[layer], self.scaling
                found.append(row_scores.attention_profile(q, at, keys, edges, scaling=scaling))

        self.run(ids, kv, np.arange(len(ids)), watch=watch)
        return kv, found[0].cpu().numpy().astype(np.float16)  # as servers keep it

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden).float()

    @torch.no_grad()
    def go_on(self, kv: KV, ids: Tokens, *, known: int) -> torch.Tensor:
        """Logits [n, vocab] after each of ``ids[known:]``, over the KV of ``ids[:known]``.

        Uses what room ``kv`` has left; what is there is overwritten.
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
        """The prompt and ``count`` tokens after it, from its KV and the logits of its last."""
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
        self._profiles: list[np.ndarray | None] = []

    def add(self, ids: Tokens, kv: KV | None = None) -> None:
        """Cache a prompt, with the KV of full prefill where none is given, and then with what its
        rows attended to, if traces are to know that."""
        self.mirror.add(ids)
        profile: np.ndarray | None = None
        if kv is None and self.config.depends_at:
            layer = probe_layer(len(self.model.layers), self.config.depends_at)
            kv, profile = self.model.profiled(ids, layer)
        self._kv.append(self.model.full(ids)[1] if kv is None else kv)
        self._profiles.append(profile)

    def prior(self, plan: ReusePlan) -> np.ndarray | None:
        """How much each copied row is likely to be off [prompt_len], as far as it is known."""
        profiles = np.full((plan.prompt_len, len(EDGES)), np.nan)
        for run in plan.runs:
            profile = self._profiles[self.mirror.owner(run)]
            if profile is not None and self.config.depends_at:
                profiles[run.dst_start : run.dst_stop] = profile[run.src_start : run.src_stop]
        return outside(plan, profiles)

    def selector(self, name: str, *, seed: int = 0) -> Selector:
        """The selector of that name, under the config's options; ``oracle`` chooses by the true
        deviation over all layers."""
        seam, window = self.config.seam, self.config.window
        match name:
            case "window":
                return Window(seam, window)
            case "trace":
                return AttentionTrace(seam, self.config.stretch)
            case "dhd":
                return Dhd(seam, window, self.config.tau)
            case "oracle":
                return baseline("deviation", seam=seam)
        return baseline(name, seam=seam, seed=seed)

    def plan(self, ids: Tokens, selector: str = "trace") -> ReusePlan:
        """What the selector starts from; without copies where the server would decline."""
        return self.mirror.plan(ids, self.config, self.selector(selector))

    def copied(self, ids: Tokens, plan: ReusePlan, *, room: int = 0) -> KV:
        """KV with the exact prefix and every run in place, K re-rotated; zeros elsewhere, and in
        the ``room`` after the prompt."""
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
        """Prefill with ``selector`` choosing among the plan's runs, which may be another's.

        ``oracle`` needs full prefill's KV as ``truth``.
        """
        chooser = self.selector(selector, seed=seed)
        kv = self.copied(ids, plan, room=room)
        if selector == "oracle":
            assert truth is not None
            assert isinstance(chooser, TopRows)
            scores = self._truth(plan, kv, truth)
            done = chooser.select(SelectionRequest(plan, budget, scores, seed))
            return self._run(ids, kv, done, scores=scores)
        if selector == "prophetkv":
            assert isinstance(chooser, TopRows)
            scores, asked = self._prophecy(ids, kv, plan)
            done = chooser.select(SelectionRequest(plan, budget, scores, seed))
            return self._run(ids, kv, done, scores=scores, probed=(asked,))
        match chooser:
            case AttentionTrace():
                trace = chooser.trace(plan, budget=budget, prior=self.prior(plan))
                first = trace.rows
                states: list[torch.Tensor] = []
                probed = self._follow(trace, ids, kv, states)
                done = plan.recompute(chooser.rows(plan, trace))
                return self._carried(ids, kv, done, trace.carried(), first, states, probed)
            case Dhd() | TopRows():
                return self._checked(ids, kv, plan, chooser, budget, check_layer, seed)
            case Window() | Structural():
                done = chooser.plan(
                    plan.runs,
                    prompt_len=plan.prompt_len,
                    prefix_len=plan.prefix_len,
                    budget=budget,
                )
                # Runs that this rule would not reuse are computed, over what was copied of them.
                return self._run(ids, kv, done)
        raise AssertionError(f"no way to run the selector {selector!r}")

    def _run(self, ids: Tokens, kv: KV, plan: ReusePlan, **more: Any) -> Partial:
        hidden, by_layer = self.model.run(ids, kv, plan.compute.positions)
        return Partial(self.model.logits(hidden[-1]), kv, by_layer, plan, **more)

    def _carried(
        self, ids: Tokens, kv: KV, plan: ReusePlan, joins: Rows, first: Rows,
        states: list[torch.Tensor], probed: tuple[np.ndarray, ...],
    ) -> Partial:  # fmt: skip
        """All rows but those that join where the first pass ended; from there on all. ``states``:
        what entered the probe layer, of the rows of each pass."""
        joins = joins if self._probe else Rows()
        if not joins:
            return self._run(ids, kv, plan, probed=probed)
        rows = plan.compute
        given = (joins.places_in(rows), states[0][joins.places_in(first)])
        hidden, by_layer = self.model.run_joined(
            ids, kv, rows.positions, layer=self._probe, given=given
        )
        return Partial(self.model.logits(hidden[-1]), kv, by_layer, plan, probed=probed)

    def _checked(
        self, ids: Tokens, kv: KV, plan: ReusePlan, chooser: Dhd | TopRows, budget: float,
        check_layer: int, seed: int,
    ) -> Partial:  # fmt: skip
        """Every row up to the check layer, the chosen ones after it."""
        found: list[tuple[RowScores, ReusePlan]] = []

        def choose(q: Any, k: Any, v: Any, at: Any, layer: int) -> np.ndarray:
            scores = self._scores(plan, kv, q, k, v, at, layer)
            done = chooser.select(SelectionRequest(plan, budget, scores, seed))
            found.append((scores, done))
            return done.compute.positions - plan.prefix_len

        every = np.arange(plan.prefix_len, plan.prompt_len)
        hidden, by_layer = self.model.run(ids, kv, every, check_layer=check_layer, choose=choose)
        ((scores, done),) = found
        return Partial(self.model.logits(hidden[-1]), kv, by_layer, done, scores)

    @property
    def _probe(self) -> int:
        return probe_layer(len(self.model.layers), self.config.probe_at)

    def _follow(
        self, trace: Trace, ids: Tokens, kv: KV, states: list[torch.Tensor] | None = None
    ) -> tuple[np.ndarray, ...]:
        """Take a trace to its end; the rows that ran for it, by step. ``states`` gets what entered
        the probe layer, by step."""
        probed = []
        while not trace.done:
            probed.append(trace.rows.positions)
            mass = self._reads(ids, kv, trace.rows, trace.query, states)
            trace.feed(mass[: trace.length])
        return tuple(probed)

    def _reads(
        self, ids: Tokens, kv: KV, rows: Rows, query: Rows,
        states: list[torch.Tensor] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Run ``rows`` up to the probe layer; the attention of ``query``, the last of them, to
        each position there."""
        layer = self._probe
        q, entered = self.model.peek(ids, kv, rows.positions, layer)
        q = q[-query.num :]
        if states is not None:
            states.append(entered)
        at = torch.as_tensor(query.positions, device=q.device)
        keys = kv.k[layer, : query.stop]
        scaling = self.model.scaling
        mass = row_scores.attention_mass(q, at, keys, scaling=scaling, strongest_head=True)
        return np.pad(mass.cpu().numpy(), (0, len(ids) - len(mass)))

    def decode(
        self, ids: Tokens, known: int, done: Partial, *, every: int
    ) -> tuple[torch.Tensor, int]:
        """Logits [n, vocab] after each of ``ids[known:]``, fed one by one with refresh as the
        server does it, and how many rows were refreshed. ``every``: as --kvshare-refresh-every."""
        kv, watch = self.model.widened(done.kv, len(ids), known=known), Watch.of_plan(done.plan)
        steps = [self.step(ids, kv, watch, n, every=every) for n in range(known, len(ids))]
        if not steps:
            return done.logits[:0].view(0, len(done.logits)), 0
        return torch.stack([logits for logits, _ in steps]), sum(count for _, count in steps)

    def step(
        self, ids: Tokens, kv: KV, watch: Watch, n: int, *, every: int
    ) -> tuple[torch.Tensor, int]:
        """Feed ``ids[n]``: logits after it, and how many rows were refreshed before it ran."""
        here, count = Rows([(n, n + 1)]), 0
        if every and not watch.over and watch.tick():
            mass = self._reads(ids, kv, here, here)[: len(watch.open)]
            if watch.wants(mass, above=self.config.refresh_above):
                count = self._refresh(ids, kv, watch, mass, every)
        hidden, _ = self.model.run(ids, kv, here.positions)
        return self.model.logits(hidden[-1]), count

    def _refresh(self, ids: Tokens, kv: KV, watch: Watch, mass: np.ndarray, every: int) -> int:
        config = self.config
        layer = self._probe
        trace = Trace(watch.open, rows=Rows(), query=Rows(), count=config.refresh_rows)
        trace.feed(mass)
        before = kv.v[layer].clone()
        self._follow(trace, ids, kv)
        rows = trace.chosen.positions
        self.model.run(ids, kv, rows)
        at = torch.as_tensor(rows, device=before.device)
        far = float(row_scores.deviation(kv.v[layer, at], before[at]).mean())
        watch.refreshed(rows, far=far, pause=every, unchanged=config.refresh_unchanged)
        return len(rows)

    def _scores(
        self, plan: ReusePlan, kv: KV, q: Any, k: Any, v: Any, at: Any, layer: int
    ) -> RowScores:
        """All rows after the prefix are here: compare the reused ones with what was copied."""
        where = plan.reused_rows.positions
        here = torch.as_tensor(where - plan.prefix_len, device=q.device)
        slots = torch.as_tensor(where, device=q.device)
        query = torch.as_tensor(
            query_rows(plan, suffix=self.config.seam).positions - plan.prefix_len, device=q.device
        )
        keys = kv.k[layer, : plan.prompt_len].clone()
        keys[at] = k  # every row is fresh in this layer
        mass = row_scores.attention_mass(q[query], at[query], keys, scaling=self.model.scaling)
        return RowScores(
            where,
            row_scores.deviation(k[here], kv.k[layer, slots]).cpu().numpy(),
            row_scores.deviation(v[here], kv.v[layer, slots]).cpu().numpy(),
            mass[slots].cpu().numpy(),
        )

    def _prophecy(self, ids: Tokens, kv: KV, plan: ReusePlan) -> tuple[RowScores, np.ndarray]:
        """What the new text and the question read over the copies, in all layers; and their rows.

        ProphetKV (arXiv 2602.02579), after its description: what the question attends to, fused
        over layers.
        """
        must = required_rows(plan, suffix=self.config.seam)
        query = must.clip(query_rows(plan, suffix=self.config.seam).start, plan.prompt_len)
        rest = (must - query).positions
        if len(rest):
            self.model.run(ids, kv, rest)
        mass = self.model.reads(ids, kv, query.positions).cpu().numpy()
        where = plan.reused_rows.positions
        nothing = np.zeros(len(where), np.float32)
        return RowScores(where, nothing, nothing, mass[where]), must.positions

    def _truth(self, plan: ReusePlan, kv: KV, truth: KV) -> RowScores:
        where = plan.reused_rows.positions
        at = torch.as_tensor(where)
        k, v = (
            torch.stack(
                [row_scores.deviation(t[at], c[at]) for t, c in zip(true, mine, strict=True)]
            ).mean(dim=0).cpu().numpy()
            for true, mine in ((truth.k, kv.k), (truth.v, kv.v))
        )  # fmt: skip
        return RowScores(where, k, v, np.ones(len(where), np.float32))
