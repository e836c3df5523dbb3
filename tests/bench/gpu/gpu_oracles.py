"""What must hold on a GPU, in bf16: partial prefill, exactness, and life under pressure.

bf16 and batches of other shapes make bitwise oracles useless here. So everything is held against
a reference of its own, the same weights run in fp32 by transformers, and the law is always the
same: *our* distance from it is no larger than a few times the distance of plain full prefill in
bf16. A slot with a wrong owner, a missed row or a wrong position is off by orders of magnitude.

``test_gpu.py`` and ``scripts/gpu_visit.sh`` run these. With ``device="cpu"`` the same code runs
without a GPU, in a small shape.
"""

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lab import Lab, computed, lab, request

VOCAB = 997
FACTOR = 2.0  # how much further from fp32 than plain bf16 anything may be
# K and V of layer 0 depend on token and position alone, so that even copied ones are known.
# A wrong token or position gives about 1.
LAYER0 = 0.06
PROFILED_AT = 0.5  # depth at which it is noted what rows attend to
# Of attention that sums to 1, what bf16 may move; rows of another layer are off by .3 and more.
PROFILE_OFF = 0.05


class Case(NamedTuple):
    """One server to hold the laws against. ``attention``: --kvshare-attention. ``most_ranges``: how
    many the rows of a batch may fall into where the backend attends (as many requests may run);
    lone rows, which a trace takes, are one each."""

    backend: str = "triton"
    page_size: int = 1
    device: str = "cuda"
    attention: str = "auto"
    most_ranges: int = 1024

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def kernel(self) -> bool:
        """Whether our own kernel is to attend for partial batches."""
        return self.attention == "auto" and self.backend != "torch_native"

    @property
    def interpreted(self) -> bool:
        """SGLang's own triton backend and our kernels, in Triton's interpreter: as a GPU's server
        does, but slow."""
        return self.backend == "triton" and not self.on_gpu

    @property
    def unread(self) -> int:
        """Tokens of an answer that nobody looks at: interpreted, each takes a while."""
        return 2 if self.interpreted else 8


class Checks:
    """Named numbers with their limits; what failed can be told at the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}

    def at_most(self, name: str, value: float, limit: float) -> None:
        # "not <=" also fails a nan
        self.rows.append({"name": name, "value": value, "at_most": limit, "ok": value <= limit})

    def at_least(self, name: str, value: float, limit: float) -> None:
        self.rows.append({"name": name, "value": value, "at_least": limit, "ok": value >= limit})

    def equal(self, name: str, value: Any, wanted: Any) -> None:
        self.rows.append({"name": name, "value": value, "equal": wanted, "ok": value == wanted})

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if not row["ok"]]

    def to_json(self) -> dict[str, Any]:
        return {"ok": not self.failed, "checks": self.rows, "facts": self.facts}


# ---- the model and its reference ---------------------------------------------------------------


def make_model(folder: Path, *, small: bool) -> Path:
    """A random Llama in bf16, written once. Its heads have the size that flashinfer compiles for
    the 8B shape too: 128, four query heads to a KV head."""
    path = folder / ("llama-gpu-small" if small else "llama-gpu")
    if (path / "model.safetensors").exists():
        return path
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = 128 if small else 512
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3 if small else 6,
        num_attention_heads=4 if small else 8,
        num_key_value_heads=2,
        head_dim=32 if small else 128,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        # attention, not the residual alone, must decide the next token
        initializer_range=1.7 / hidden**0.5,
    )
    torch.manual_seed(0)
    draft = path.with_name(f"{path.name}-{os.getpid()}")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(draft)
    with contextlib.suppress(OSError):  # somebody else may have made it meanwhile
        draft.rename(path)
    return path


class Reference:
    """The same weights in fp32, by transformers."""

    def __init__(self, path: Path, device: str) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self.device = device
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model = model.to(device).eval()

    def run(self, ids: list[int]) -> tuple[Any, tuple[Any, Any]]:
        """Logits [n, vocab], and K and V [layers, n, heads, dim]; fp32, on the CPU."""
        import torch

        with torch.no_grad():
            out = self.model(torch.tensor([ids], device=self.device), use_cache=True)
        layers = out.past_key_values.layers
        keys = torch.stack([layer.keys[0].transpose(0, 1) for layer in layers])
        values = torch.stack([layer.values[0].transpose(0, 1) for layer in layers])
        return out.logits[0].float().cpu(), (keys.cpu(), values.cpu())

    def token_gap(self, prompt: list[int], output: list[int]) -> float:
        """How far below the best token's logit the chosen ones are, at worst."""
        logits, _ = self.run(prompt + output[:-1])
        logits = logits[len(prompt) - 1 :]
        best = logits.max(dim=-1).values
        chosen = logits.gather(1, logits.new_tensor(output).long()[:, None])[:, 0]
        return float((best - chosen).max())


def rms(x: Any) -> float:
    return float(x.double().square().mean().sqrt())


def kv_gap(mine: tuple[Any, Any], wanted: tuple[Any, Any]) -> float:
    """Relative distance of K and V over all layers and positions."""
    pairs = list(zip(mine, wanted, strict=True))
    return max(rms(a.double() - b.double()) / rms(b) for a, b in pairs)


def layer0_gap(mine: tuple[Any, Any], wanted: tuple[Any, Any]) -> float:
    """The same of the worst single position and head in layer 0."""
    worst = 0.0
    for a, b in zip(mine, wanted, strict=True):
        off = (a[0].double() - b[0].double()).norm(dim=-1) / b[0].double().norm(dim=-1)
        worst = max(worst, float(off.max()))
    return worst


# ---- servers and texts -------------------------------------------------------------------------


def settings(case: Case, *, env: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of a lab; overlap is always on, and the prefill graphs where there is a GPU."""
    env = dict(env or {})
    args: dict[str, Any] = {
        "device": case.device,
        "attention_backend": case.backend,
        "page_size": case.page_size,
        "dtype": "bfloat16",
        "disable_overlap_schedule": False,
        "max_total_tokens": 8192,
    }
    if more.get("kvshare"):
        args["kvshare_attention"] = case.attention
    if case.interpreted:
        env["TRITON_INTERPRET"] = "1"
        args["triton_attention_num_kv_splits"] = 1  # each takes as long as all of them would
    if case.backend != "torch_native":
        args["max_running_requests"] = case.most_ranges
    if case.on_gpu:
        args |= {
            "sampling_backend": "pytorch",
            # Other processes take memory of the same GPU meanwhile; max_total_tokens is the bound.
            "mem_fraction_static": 0.8,
            "cuda_graph_max_bs_decode": 8,
            "cuda_graph_bs_prefill": [32, 64, 128, 256, 512, 1024],
        }
        # The paged wrapper alone: the ragged one would compile another set of kernels on Hopper.
        paged = os.environ.get("SGLANG_FLASHINFER_USE_PAGED", "1")
        env |= {"SGLANG_USE_CPU_ENGINE": "0", "SGLANG_FLASHINFER_USE_PAGED": paged}
    return {**args, "env": env, **more}


@contextlib.contextmanager
def server(case: Case, model: Path, **more: Any) -> Iterator[Lab]:
    with lab(model, **settings(case, **more)) as it:
        it.ask("gpu_probes:prepare")
        yield it


class Texts:
    """Seeded random texts, and rows of them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def passage(self, length: int) -> list[int]:
        return [self.rng.randrange(2, VOCAB) for _ in range(length)]

    def rows(self, length: int, *, start: int = 0) -> list[tuple[int, int]]:
        """Ascending, disjoint ranges in ``[start, length)``; the last token is among them."""
        cuts = sorted(self.rng.sample(range(start, length), 8))
        ranges = list(zip(cuts[::2], cuts[1::2], strict=True))
        last = (length - self.rng.randrange(1, 9), length)
        return [*(r for r in ranges if r[1] < last[0]), last]


def assert_idle(checks: Checks, it: Lab, name: str) -> None:
    """Idle: SGLang's own leak checks have run by now; ours must hold too."""
    state = it.ask("probes:check")
    held = state["protected"] + state["pins"]
    checks.equal(f"{name}: locks left", held, 0)
    checks.equal(f"{name}: tokens in both trees", state["resident"], state["evictable"])
    known = state["available"] + state["evictable"]
    checks.equal(f"{name}: slots accounted for", known, state["total"])


def check_ways(checks: Checks, case: Case, it: Lab) -> None:
    """Batches replay a graph where there is one, partial ones too."""
    ways = Counter(it.ask("gpu_probes:prefill_ways"))
    checks.facts["prefill batches"] = dict(ways)
    checks.at_least("partial batches", ways["partial, eager"] + ways["partial, graph"], 1)
    checks.equal("our kernel attends", it.ask("gpu_probes:has_kernel"), case.kernel)
    checks.equal("kernels that gave way to torch", it.ask("gpu_probes:gave_way"), [])
    if case.on_gpu:
        checks.at_least("partial batches in a graph", ways["partial, graph"], 1)
        checks.at_least("full batches in a graph", ways["full, graph"], 1)


# ---- the oracles -------------------------------------------------------------------------------


def check_partial(case: Case, model: Path) -> Checks:
    """With exact KV in the skipped slots, partial prefill is as good as full prefill; so is a
    budget of 1. Page size 1 runs whole prompts, others run chunks, mixed with decoding."""
    checks, texts = Checks(), Texts(case.page_size)
    reference = Reference(model, case.device)
    chunks = (
        {} if case.page_size == 1 else {"chunked_prefill_size": 128, "enable_mixed_chunk": True}
    )
    lengths = (40, 290, 700, 1500) if case.on_gpu else (40, 290)
    turns = 4
    if case.interpreted:
        lengths, turns = (40, 200), 1
    prompts = [texts.passage(n) for n in lengths]
    with server(case, model, kvshare=True, **chunks) as it:
        it.ask("probes:force_plans")
        wanted = [reference.run(prompt) for prompt in prompts]
        script: list[Any] = []
        for i, prompt in enumerate(prompts):
            full = request(f"f{i}", prompt, extra_key="full", keep="kv", new=case.unread)
            script += [full, ("idle",)]
            # The tree keeps whole pages in one piece, so the donors continue past the prompt's end.
            donor = request(f"d{i}", prompt + texts.passage(32), extra_key="donor", new=1)
            script += [donor, ("idle",)]
        done = it.play(script)
        full_off, part_off, full_kv, part_kv = [], [], [], []
        copied = 0
        for i, prompt in enumerate(prompts):
            logits, kv = wanted[i]
            full_off.append(rms(done[f"f{i}"]["logits"] - logits[-1]) / rms(logits[-1]))
            full_kv.append(kv_gap(done[f"f{i}"]["kv"], kv))
            for turn in range(turns):
                rows = texts.rows(len(prompt))
                key = f"t{i}{turn}"
                part = it.one(prompt, forced=rows, extra_key=key, keep="kv", new=case.unread)
                part_off.append(rms(part["logits"] - logits[-1]) / rms(logits[-1]))
                part_kv.append(kv_gap(part["kv"], kv))
                copied += part["kvshare"]["copied_tokens"] > 0
                if not chunks:
                    ran = computed(part["kvshare"])
                    checks.equal(f"rows run of {len(prompt)}", ran, sum(b - a for a, b in rows))
        checks.equal("partial prefills that copied", copied, len(part_off))
        base = _rms_of(full_off)
        checks.facts |= {"full off": full_off, "partial off": part_off}
        checks.at_most("full prefill's own distance from fp32", base, 0.2)
        checks.at_most("logits: partial over full", _rms_of(part_off) / base, FACTOR)
        checks.at_most("logits: worst partial over full", max(part_off) / base, 3 * FACTOR)
        base_kv = _rms_of(full_kv)
        checks.at_most("KV: partial over full", _rms_of(part_kv) / base_kv, FACTOR)

        # A prefix hit before the rows.
        prompt, (logits, _) = prompts[-1], wanted[-1]
        it.one(prompt[:130], new=1, kvshare="exact", extra_key="hit")
        rows = texts.rows(len(prompt), start=160)
        hit = it.one(prompt, forced=rows, extra_key="hit", new=case.unread)
        checks.at_least("tokens of the prefix hit", hit["kvshare"]["exact_tokens"], 112)
        off = rms(hit["logits"] - logits[-1]) / rms(logits[-1])
        checks.at_most("logits: after a prefix hit, over full", off / base, 3 * FACTOR)

        # Batches that mix partial, plain and decoding requests.
        slack = _slack(base, wanted)
        checks.facts["slack of tokens"] = slack
        batch = [
            request(
                f"m{i}",
                prompt,
                forced=texts.rows(len(prompt)) if i % 2 == 0 else None,
                extra_key=f"m{i}",
                new=6,
            )
            for i, prompt in enumerate(prompts)
        ]
        late = [
            request("late", prompts[0], forced=texts.rows(len(prompts[0])), extra_key="l", new=6),
            request("plain", prompts[1], kvshare="exact", extra_key="p", new=6),
        ]
        answers = it.play([batch, ("polls", 3), late])
        copied = sum(a["kvshare"]["copied_tokens"] > 0 for a in answers.values())
        checks.equal("partial requests in mixed batches", copied, (len(prompts) + 1) // 2 + 1)
        of = {f"m{i}": prompt for i, prompt in enumerate(prompts)}
        of |= {"late": prompts[0], "plain": prompts[1]}
        gaps = [reference.token_gap(of[rid], a["output"]) for rid, a in answers.items()]
        checks.at_most("tokens of mixed batches below the best", max(gaps), slack)

        # Budget 1: every reused row is computed again.
        it.flush()
        a, b = (texts.passage(n) for n in ((120, 100) if case.interpreted else (300, 200)))
        it.one(a + b, new=case.unread)
        prompt = b + a + texts.passage(30)
        logits, _ = reference.run(prompt)
        whole = it.one(prompt, kvshare={"budget": 1.0}, new=case.unread)
        off = rms(whole["logits"] - logits[-1]) / rms(logits[-1])
        checks.equal("budget 1: tokens copied", whole["kvshare"]["copied_tokens"], 0)
        checks.at_most("logits: budget 1 over full", off / base, 3 * FACTOR)
        assert_idle(checks, it, "at the end")
        check_ways(checks, case, it)
    return checks


def check_choice(case: Case, model: Path) -> Checks:
    """Whatever rows are chosen inside the server, exact KV in the others is as good as full
    prefill, and so is what decoding refreshes."""
    checks, texts = Checks(), Texts(case.page_size + 40)
    reference = Reference(model, case.device)
    lengths = (300, 900) if case.on_gpu else (160,)
    watch = {"kvshare_refresh_every": 1, "kvshare_refresh_above": 0.0, "kvshare_refresh_rows": 8}
    for select in ("trace", "dhd"):
        with server(case, model, kvshare=True, kvshare_select=select, **watch) as it:
            it.ask("probes:force_plans")
            if case.kernel and select == "trace":
                it.ask("gpu_probes:compare_passes")
            full_off, part_off, refreshed = [], [], 0
            for i, length in enumerate(lengths):
                prompt = texts.passage(length)
                logits, _ = reference.run(prompt)
                donor = prompt + texts.passage(32)
                it.one(donor, extra_key="donor", new=1, kvshare="exact")
                full = it.one(prompt, extra_key=f"full{i}", kvshare="exact", new=case.unread)
                rows = [(0, 20), (length - 5, length)]
                written = 5 if case.interpreted else 12
                part = it.one(prompt, forced=rows, extra_key=f"part{i}", new=written)
                told = part["kvshare"]
                checks.equal(f"{select}: declined", told["declined"], None)
                checks.at_least(f"{select}: copied", told["copied_tokens"], length // 2)
                refreshed += told.get("refreshed_tokens", 0)
                full_off.append(rms(full["logits"] - logits[-1]) / rms(logits[-1]))
                part_off.append(rms(part["logits"] - logits[-1]) / rms(logits[-1]))
            # Two in one batch: the second's rows begin where the first's end.
            twins = [texts.passage(length) for length in (lengths[0], lengths[0] - 30)]
            for prompt in twins:
                donor = prompt + texts.passage(32)
                it.one(donor, extra_key="donor", new=1, kvshare="exact")
            rows = [[(0, 20), (len(prompt) - 5, len(prompt))] for prompt in twins]
            both = it.play([[
                request(f"w{i}", prompt, forced=rows[i], extra_key=f"w{i}", new=2)
                for i, prompt in enumerate(twins)
            ]])  # fmt: skip
            for i, prompt in enumerate(twins):
                logits, _ = reference.run(prompt)
                told = both[f"w{i}"]["kvshare"]
                checks.at_least(f"{select}: copied beside another", told["copied_tokens"], 60)
                part_off.append(rms(both[f"w{i}"]["logits"] - logits[-1]) / rms(logits[-1]))
            base = _rms_of(full_off)
            checks.facts |= {f"{select}, full off": full_off, f"{select}, partial off": part_off}
            checks.at_most(f"{select}: logits over full", max(part_off) / base, 3 * FACTOR)
            checks.at_least(f"{select}: refreshed", refreshed, 8 * len(lengths))
            assert_idle(checks, it, select)
            there = Counter(it.ask("gpu_probes:prefill_ways"))["traces on the device"]
            wanted = case.kernel and select == "trace"
            checks.equal(f"{select}: traced on the device", there > 0, wanted)
            if wanted:
                off = it.ask("gpu_probes:passes_off")
                checks.at_least("passes replayed", len(off), 6)
                checks.facts["replayed passes off"] = off
                checks.at_most("replayed passes off", max(off), 1e-4 if not case.on_gpu else 0.05)
    return checks


def check_exact(case: Case, model: Path) -> Checks:
    """Exact, fuzzy, exact again; alone and beside each other: the exact ones stay exact."""
    checks, texts = Checks(), Texts(100 + case.page_size)
    reference = Reference(model, case.device)
    chunks = {} if case.page_size == 1 else {"chunked_prefill_size": 128}
    sources, prompts = _corpus(texts, parts=2 if case.interpreted else 1)
    prompts = prompts if case.on_gpu else prompts[:1]
    written = 12 if case.on_gpu else 3  # each token takes seconds in an interpreter
    seen: dict[str, list[float]] = {k: [] for k in ("alone", "first", "again", "twin", "fuzzy")}
    gaps: dict[str, list[float]] = {"theirs": [], "ours": []}
    offs, wanted, same_bits, moved = [], [], 0, []
    with (
        server(case, model, kvshare=True, **chunks) as ours,
        server(case, model, **chunks) as theirs,
    ):
        for prompt in prompts:
            logits, kv = reference.run(prompt)
            wanted.append((logits, kv))
            alone = theirs.play([("flush",), request("x", prompt, new=written, keep="kv")])["x"]
            offs.append(rms(alone["logits"] - logits[-1]) / rms(logits[-1]))
            ours.flush()
            first = ours.one(prompt, new=written, kvshare="exact", keep="kv")
            same_bits += all((x == y).all() for x, y in zip(first["kv"], alone["kv"], strict=True))
            ours.flush()
            for source in sources:
                ours.one(source, new=case.unread)
            fuzzy = ours.one(prompt, new=case.unread, keep="kv")
            checks.at_least("tokens reused", fuzzy["kvshare"]["copied_tokens"], 100)
            moved.append(layer0_gap(fuzzy["kv"], kv))
            again = ours.one(prompt, new=written, kvshare="exact", keep="kv")
            for name, answer in (("first", first), ("again", again), ("fuzzy", fuzzy)):
                seen[name].append(kv_gap(answer["kv"], kv))
            seen["alone"].append(kv_gap(alone["kv"], kv))
            ours.flush()
            for source in sources:
                ours.one(source, new=case.unread)
            together = ours.play(
                [
                    [
                        request("fuzzy", prompt, new=written),
                        request("exact", prompt, kvshare="exact", new=written, keep="kv"),
                    ],
                    ("polls", 2),
                    request("late", prompt, kvshare="exact", new=written, keep="kv"),
                ]
            )
            seen["twin"] += [kv_gap(together[rid]["kv"], kv) for rid in ("exact", "late")]
            gaps["theirs"].append(reference.token_gap(prompt, alone["output"]))
            for answer in (first, again, together["exact"], together["late"]):
                gaps["ours"].append(reference.token_gap(prompt, answer["output"]))
        depths = sorted(ours.ask("probes:plain_keys_of_depth"))
        checks.equal("depths in the plain branch", depths, [0])
        assert_idle(checks, ours, "at the end")
        check_ways(checks, case, ours)
    base = _rms_of(seen["alone"])
    checks.facts |= {"KV off": seen, "tokens below the best": gaps}
    checks.equal("KV with the same bits as without kvshare", same_bits, len(prompts))
    checks.at_most("KV: plain server's own distance from fp32", base, 0.2)
    for name in ("first", "again", "twin"):
        checks.at_most(f"KV: exact ({name}) over plain", max(seen[name]) / base, FACTOR)
    checks.at_least("KV: the fuzzy twin differs, over plain", min(seen["fuzzy"]) / base, 3 * FACTOR)
    checks.at_most("layer 0 of moved KV", max(moved), LAYER0)
    slack = max(_slack(_rms_of(offs), wanted), FACTOR * max(gaps["theirs"]))
    checks.at_most("tokens below the best", max(gaps["ours"]), slack)
    return checks


def check_profiles(case: Case, model: Path) -> Checks:
    """What rows attend to is noted for each row of a prompt, in chunks and beside others, as the
    definition has it of the same weights in fp32; a copy has its source's, and traces rank by it
    on the device where our kernel attends."""
    import numpy as np
    import torch

    from kvshare_sglang.policy.select.attention_trace import probe_layer
    from kvshare_sglang.sim.engine import Model

    checks, texts = Checks(), Texts(300 + case.page_size)
    plain = Model(model, dtype=torch.float32, device=case.device)
    layer = probe_layer(len(plain.layers), PROFILED_AT)
    chunks = {} if case.page_size == 1 else {"chunked_prefill_size": 128}
    how = {"kvshare_select": "trace", "kvshare_depends_at": PROFILED_AT, **chunks}
    a, b = texts.passage(90), texts.passage(80)
    prompts = {"source": texts.passage(14) + a + b, "other": texts.passage(70)}
    moved = texts.passage(20) + b + a + texts.passage(30)
    with server(case, model, kvshare=True, **how) as it:
        it.ask("probes:keep_profiles")
        many = [
            request(rid, ids, new=3, kvshare="exact", keep="kv") for rid, ids in prompts.items()
        ]
        answers = it.play([many])
        for rid, ids in prompts.items():
            found = it.ask("probes:profiles", rid)
            whole = np.array(ids + answers[rid]["output"][:-1], np.int32)
            want = plain.profiled(whole, layer)[1][: len(ids)].astype(np.float64)
            off = np.abs(found[: len(ids)] - want)
            checks.at_most(f"{rid}: largest difference", float(off.max()), PROFILE_OFF)
            checks.at_most(f"{rid}: mean difference", float(off.mean()), PROFILE_OFF / 10)
            blank = float(np.isnan(found[len(ids) :]).all(1).mean())
            checks.equal(f"{rid}: share of the answer's rows without", blank, 1.0)
        of_source = it.ask("probes:profiles", "source")
        told = it.play([request("moved", moved, new=1, keep="kv")])["moved"]["kvshare"]
        checks.equal("declined", told["declined"], None)
        checks.at_least("copied", told["copied_tokens"], 80)
        found = it.ask("probes:profiles", "moved")
        checks.equal("rows of the prompt without", int(np.isnan(found).any(1).sum()), 0)
        as_source = (found[:, None] == of_source[None]).all(-1).any(1).sum()
        checks.at_least("rows with what a source's row has", int(as_source), told["copied_tokens"])
        checks.at_most("priors here from their definition", it.ask("gpu_probes:priors_off"), 1e-6)
        there = Counter(it.ask("gpu_probes:prefill_ways"))["traces on the device"]
        # in chunks a trace looks at rows of earlier ones, which is done on the host
        checks.equal("traced on the device", there > 0, case.kernel and not chunks)
        checks.equal("still noted", it.ask("gpu_probes:notes_profiles"), True)
        assert_idle(checks, it, "at the end")
    return checks


def check_doubts(case: Case, model: Path) -> Checks:
    """From a token in doubt on a request is full prefill's, the first or a later one, and its
    neighbours get the tokens that they get alone."""
    checks, texts = Checks(), Texts(500 + case.page_size)
    a, b = texts.passage(70), texts.passage(60)
    source, prompt = texts.passage(9) + a + b, texts.passage(20) + b + a + texts.passage(20)
    near = [texts.passage(40), texts.passage(50)]
    with server(case, model, kvshare=True, kvshare_select="trace", kvshare_budget=1e-6) as it:
        full = it.one(prompt, kvshare="exact", extra_key="full", new=10, keep="kv")
        alone = [it.one(ids, kvshare="exact", extra_key="alone", new=10)["output"] for ids in near]
        it.one(source, new=1)
        copies = it.one(prompt, new=1, keep="kv")
        far, off = kv_gap(copies["kv"], full["kv"]), rms(copies["logits"] - full["logits"])
        checks.at_least("copies are another thing: KV", far, 0.1)
        for when, told in (("first", {"doubt": 1000}), ("later", None)):
            it.play([("flush",), request("source", source, new=1)])
            script: list[Any] = [[
                request("0", near[0], kvshare="exact", new=10),
                request("doubts", prompt, kvshare=told, new=10, keep="kv"),
                request("1", near[1], kvshare="exact", new=10),
            ]]  # fmt: skip
            if told is None:
                script += [("polls", 4), ("call", "gpu_probes:doubt_now")]
            answers = it.play(script)
            part = answers["doubts"]
            rows = part["kvshare"].get("settled_tokens", 0)
            checks.at_least(f"{when}: rows settled", rows, len(prompt) - 20 + (told is None))
            checks.at_most(
                f"{when}: KV off full prefill's", kv_gap(part["kv"], full["kv"]), far / 4
            )
            if told is not None:
                gap = rms(part["logits"] - full["logits"])
                checks.at_most(f"{when}: logits off full prefill's", gap, off / 4)
            for i, output in enumerate(alone):  # of bf16 one may be a toss, a batch apart
                same = sum(map(int.__eq__, answers[str(i)]["output"], output))
                checks.at_least(f"{when}: tokens of neighbour {i} as alone", same, 6)
            assert_idle(checks, it, when)
    return checks


def check_life(case: Case, model: Path) -> Checks:
    """Slots churn in a pool that is too small; overlap, mixed chunks, aborts and flushes.

    K and V of layer 0 show for every request, reusing or not, that each of its slots holds its
    own token at its own position. Exact requests are checked in all layers and in their tokens.
    """
    checks, texts = Checks(), Texts(200 + case.page_size)
    rng = texts.rng
    reference = Reference(model, case.device)
    passages = [texts.passage(rng.randrange(60, 200)) for _ in range(8)]
    tight = {
        "max_total_tokens": 1408,
        "chunked_prefill_size": 160,
        "schedule_conservativeness": 0.3,
        "enable_mixed_chunk": True,
        "env": {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "30"},
    }
    tally: Counter[str] = Counter()
    base_kv, base_off, wanted = [], [], []
    worst = {"layer 0": 0.0, "KV of exact": 0.0, "tokens of exact": 0.0}
    with server(case, model, kvshare=True, **tight) as it:
        for _ in range(4 if case.on_gpu else 2):  # in peace first: what bf16 itself costs
            prompt = _prompt(rng, passages, texts)
            it.flush()
            calm = it.one(prompt, kvshare="exact", keep="kv")
            logits, kv = reference.run(prompt)
            wanted.append((logits, kv))
            base_kv.append(kv_gap(calm["kv"], kv))
            base_off.append(rms(calm["logits"] - logits[-1]) / rms(logits[-1]))
        for round_ in range(12 if case.on_gpu else 1):
            script, prompts, modes, aborted = _round(rng, passages, texts, prefix=str(round_))
            answers = it.play(script)
            for rid, answer in answers.items():
                # An abort in the queue leaves no reason on the request.
                kind = (answer["finish"] or {"type": "abort"})["type"]
                tally[kind] += 1
                tally["retractions"] += answer["retractions"]
                if kind != "length" and rid not in aborted:
                    checks.equal(f"{rid} ends by its length", answer["finish"], "length")
                if kind != "length":
                    continue
                _, kv = reference.run(prompts[rid])
                worst["layer 0"] = max(worst["layer 0"], layer0_gap(answer["kv"], kv))
                tally["reusing"] += (answer["kvshare"] or {}).get("copied_tokens", 0) > 0
                if modes[rid] == "exact":
                    tally["exact"] += 1
                    off = kv_gap(answer["kv"], kv)
                    worst["KV of exact"] = max(worst["KV of exact"], off)
                    gap = reference.token_gap(prompts[rid], answer["output"])
                    worst["tokens of exact"] = max(worst["tokens of exact"], gap)
            assert_idle(checks, it, f"round {round_}")
        check_ways(checks, case, it)
        checks.facts["tokens by kind"] = it.ask("probes:counts")["tokens"]
    checks.facts["requests"] = dict(tally)
    checks.at_least("requests that reused", tally["reusing"], 20 if case.on_gpu else 1)
    checks.at_least("exact requests", tally["exact"], 10 if case.on_gpu else 1)
    checks.at_least("retractions", tally["retractions"], 1)
    checks.at_most("layer 0, any request", worst["layer 0"], LAYER0)
    base = _rms_of(base_kv)
    checks.at_most("KV: calm requests' distance from fp32", base, 0.2)
    checks.at_most("KV: exact requests over calm ones", worst["KV of exact"] / base, 1.5 * FACTOR)
    slack = 2 * _slack(_rms_of(base_off), wanted)
    checks.at_most("tokens of exact requests below the best", worst["tokens of exact"], slack)
    return checks


def check_smoke(case: Case, model: Path) -> Checks:
    """One prompt each by structure and by a trace, with exact KV in the skipped slots. The first
    server of a backend also waits for its kernels to compile."""
    checks, texts = Checks(), Texts(300)
    reference = Reference(model, case.device)
    length = 900 if case.on_gpu else 160
    for select in ("window", "trace") if case.on_gpu else ("trace",):
        with server(case, model, kvshare=True, kvshare_select=select) as it:
            it.ask("probes:force_plans")
            prompt = texts.passage(length)
            logits, _ = reference.run(prompt)
            it.one(prompt + texts.passage(32), extra_key="donor", new=1, kvshare="exact")
            full = it.one(prompt, extra_key="full", kvshare="exact")
            rows = [(0, 20), (length // 2, length // 2 + 9), (length - 5, length)]
            part = it.one(prompt, forced=rows, extra_key="part", new=12)
            checks.equal(f"{select}: declined", part["kvshare"]["declined"], None)
            checks.at_least(f"{select}: copied", part["kvshare"]["copied_tokens"], length // 2)
            checks.equal(f"{select}: tokens answered", len(part["output"]), 12)
            base = rms(full["logits"] - logits[-1])
            off = rms(part["logits"] - logits[-1])
            checks.at_most(f"{select}: logits over full", off / base, 3 * FACTOR)
            assert_idle(checks, it, select)
    return checks


def _rms_of(values: list[float]) -> float:
    return (sum(v * v for v in values) / len(values)) ** 0.5


def _slack(off: float, wanted: list[Any]) -> float:
    """How far below the best logit a greedy token may be: eight times the noise of bf16."""
    return 8 * off * max(rms(logits[-1]) for logits, _ in wanted)


def _corpus(texts: Texts, *, parts: int = 1) -> tuple[list[list[int]], list[list[int]]]:
    """Sources, and prompts that share their passages: moved, edited, repeated. ``parts``: each
    passage is one of so many parts of its length."""
    a, b, c, d = (texts.passage(n // parts) for n in (210, 190, 170, 140))
    at = 90 // parts
    edited = a[:at] + texts.passage(3) + a[at + 5 :]
    return [a + b, c + d], [
        texts.passage(5) + b + a + texts.passage(20),
        b + c + edited + texts.passage(11),
        edited + d + b + texts.passage(30),
        a + c + d + a + texts.passage(7),
    ]


def _prompt(rng: random.Random, passages: list[list[int]], texts: Texts) -> list[int]:
    parts = rng.sample(passages, rng.randrange(1, 4))
    if rng.random() < 0.4:  # an edit
        i = rng.randrange(len(parts))
        at = rng.randrange(5, len(parts[i]) - 5)
        parts[i] = parts[i][:at] + texts.passage(rng.randrange(1, 4)) + parts[i][at + 1 :]
    middle = [token for part in parts for token in part]
    return texts.passage(rng.randrange(0, 9)) + middle + texts.passage(rng.randrange(1, 30))


def _round(
    rng: random.Random, passages: list[list[int]], texts: Texts, *, prefix: str
) -> tuple[list[Any], dict[str, list[int]], dict[str, Any], set[str]]:
    """A script of requests that come, are aborted, or meet a flush; prompts and modes by id."""
    script: list[Any] = []
    prompts: dict[str, list[int]] = {}
    modes: dict[str, Any] = {}
    aborted: set[str] = set()
    for i in range(16):
        rid = f"{prefix}-{i:02}"  # none begins another: SGLang aborts all that begin so
        prompts[rid] = _prompt(rng, passages, texts)
        modes[rid] = rng.choice([None, None, None, "exact", {"budget": 0.5}])
        script.append(
            request(
                rid,
                prompts[rid],
                new=rng.randrange(1, 60),
                kvshare=modes[rid],
                extra_key=rng.choice([None, None, "tenant"]),
                keep="kv",
            )
        )
        roll = rng.random()
        if roll < 0.2:
            victim = rng.choice(list(prompts))
            aborted.add(victim)
            script += [("polls", rng.randrange(1, 4)), ("abort", victim)]
        elif roll < 0.3:
            script.append(("idle",))
        elif roll < 0.36:
            script += [("idle",), ("flush",)]
    return script, prompts, modes, aborted
