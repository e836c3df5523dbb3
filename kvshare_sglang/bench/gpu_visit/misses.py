"""Prompts with nothing to reuse: servers beside each other, and where the time of one goes.

Two plain servers say what two servers of a kind differ by, one that takes the exact path what is
left without a lookup. They have half the layers, so that four fit beside each other: what is looked
for is time of the host. In a second part the kernels of such a prompt, with and without kvshare.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvshare_sglang.bench import models
from kvshare_sglang.bench.common import bootstrap_ci95
from kvshare_sglang.bench.server import Server, ServerSpec, serve
from kvshare_sglang.bench.ttft.cases import random_tokens

LENGTH = 384
ARMS = {
    "plain": (),
    "plain again": (),
    "kvshare": ("--kvshare",),
    "kvshare, exact": ("--kvshare", "--kvshare-default", "exact"),
}
LABS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kvshare": {"kvshare": True, "kvshare_select": "trace"},
}


def run(device: str, backend: str) -> dict[str, Any]:
    figures = {"servers": of_servers(device, backend), "kernels": of_labs(device, backend)}
    return {"ok": True, "figures": figures}


def of_servers(device: str, backend: str) -> dict[str, Any]:
    """By server: TTFT, as a ratio of the plain one's too, and what its answers say of time."""
    on_gpu = device != "cpu"
    model = models.open_model("llama-8b" if on_gpu else "replay-5m", dummy=True)
    more: tuple[str, ...] = ("--load-format", "dummy")
    if on_gpu:
        more += (
            *("--attention-backend", backend, "--sampling-backend", "pytorch"),
            *("--json-model-override-args", '{"num_hidden_layers": 16}'),
            *("--cuda-graph-max-bs-decode", "8", "--cuda-graph-bs-prefill", str(LENGTH)),
        )
    specs = [
        ServerSpec(
            name=name,
            model=model.path,
            device=device,
            threads=1 if device == "cpu" else 4,
            max_total_tokens=8192,
            mem_fraction=0.85 if on_gpu else 0.1,
            args=(*args, *more),
        )
        for name, args in ARMS.items()
    ]
    rng, vocab, pairs = np.random.default_rng(5), min(model.vocab_size, 4096), 60 if on_gpu else 2
    with serve(*specs) as servers:
        for server in servers:
            for _ in range(4):
                server.ask(random_tokens(rng, 1024, vocab).tolist())
        answers: dict[str, list[Any]] = {server.spec.name: [] for server in servers}
        for turn in range(-4, pairs):
            ids = random_tokens(rng, LENGTH, vocab).tolist()
            first = turn % len(servers)
            for server in (*servers[first:], *servers[:first]):
                answer = server.ask(ids)
                if turn >= 0:
                    answers[server.spec.name].append(answer)
        alone = {server.spec.name: _alone(server, rng, vocab, pairs) for server in servers}
    plain = [answer.ttft_s for answer in answers["plain"]]
    return {
        name: {"ttft_p50_ms": round(1e3 * alone[name], 3), "when": "one server after the other"}
        | _against(plain, each)
        for name, each in answers.items()
    }


def _alone(server: Server, rng: np.random.Generator, vocab: int, pairs: int) -> float:
    """TTFT where the others are asked nothing meanwhile."""
    return statistics.median(
        server.ask(random_tokens(rng, LENGTH, vocab).tolist()).ttft_s for _ in range(pairs)
    )


def _against(plain: Sequence[float], answers: Sequence[Any]) -> dict[str, Any]:
    ratios = [one.ttft_s / other for one, other in zip(answers, plain, strict=True)]
    told = [
        {k: v for k, v in one.meta.items() if isinstance(v, int | float)} for one in answers
    ]
    return {
        "in_turns_ttft_p50_ms": round(1e3 * statistics.median(a.ttft_s for a in answers), 3),
        "ratio_p50": round(statistics.median(ratios), 4),
        "ci95": bootstrap_ci95(ratios),
        "meta_p50": {k: statistics.median(t[k] for t in told if k in t) for k in told[0]},
    }


def of_labs(device: str, backend: str) -> dict[str, Any]:
    """Schedulers without the processes around them: seconds by prompt, and its kernels."""
    from lab import lab  # of the tests: see env.py

    on_gpu = device != "cpu"
    model = models.open_model("llama-8b" if on_gpu else "replay-5m", dummy=True)
    settings: dict[str, Any] = {
        "device": device, "attention_backend": backend, "load_format": "dummy",
        "max_total_tokens": 8192, "chunked_prefill_size": 8192, "context_length": 8192,
    }  # fmt: skip
    if on_gpu:
        settings |= {
            "dtype": "bfloat16", "sampling_backend": "pytorch", "mem_fraction_static": 0.85,
            "max_running_requests": 2048, "cuda_graph_max_bs_decode": 8,
            "cuda_graph_bs_prefill": [LENGTH], "disable_overlap_schedule": False,
            "env": {"SGLANG_USE_CPU_ENGINE": "0"},
        }  # fmt: skip
    rng, vocab = np.random.default_rng(6), min(model.vocab_size, 4096)
    out: dict[str, Any] = {}
    for name, more in LABS.items():
        with lab(model.path, **settings, **more) as it:
            it.ask("gpu_probes:prepare")

            def ask(it: Any = it) -> float:
                prompt = random_tokens(rng, LENGTH, vocab).tolist()
                begun = time.perf_counter()
                it.one(prompt, new=1)
                return time.perf_counter() - begun

            for _ in range(8):
                ask()
            seconds = [ask() for _ in range(40 if on_gpu else 2)]
            it.ask("gpu_probes:start_profile")
            ask()
            out[name] = {
                "p50_ms": round(1e3 * statistics.median(seconds), 3),
                **it.ask("gpu_probes:stop_profile"),
            }
            it.ask("gpu_probes:start_host_profile")
            for _ in range(20):
                ask()
            out[name]["functions"] = it.ask("gpu_probes:stop_host_profile", 20, 150)
    return out
