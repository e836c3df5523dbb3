"""Prompts with nothing to reuse: servers beside each other, and where the time of one goes.

Two plain servers say what two servers of a kind differ by, one that takes the exact path what is
left without a lookup. They have fewer layers, so that all fit beside each other: what is looked for
is time of the host. Beside them two schedulers without the processes around, whose kernels are
noted.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from kvshare_sglang.bench import models
from kvshare_sglang.bench.common import bootstrap_ci95
from kvshare_sglang.bench.server import Server, ServerSpec, serve
from kvshare_sglang.bench.ttft.cases import random_tokens

LENGTH, LAYERS = 384, 8
ARMS: dict[str, tuple[str, ...]] = {
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
    on_gpu = device != "cpu"
    model = models.open_model("llama-8b" if on_gpu else "replay-5m", dummy=True)
    rng, vocab = np.random.default_rng(5), min(model.vocab_size, 4096)
    repeats = 60 if on_gpu else 2

    def prompt(length: int = LENGTH) -> list[int]:
        ids: list[int] = random_tokens(rng, length, vocab).tolist()
        return ids

    with _labs(model, device, backend) as starting:
        with serve(*_specs(model, device, backend)) as servers:
            figures = {"servers": of_servers(servers, prompt, repeats)}
        figures["kernels"] = {
            name: of_lab(lab.result(), prompt, repeats) for name, lab in starting.items()
        }
    return {"ok": True, "figures": figures}


def _specs(model: models.Model, device: str, backend: str) -> list[ServerSpec]:
    on_gpu = device != "cpu"
    more: tuple[str, ...] = ("--load-format", "dummy")
    if on_gpu:
        more += (
            *("--attention-backend", backend, "--sampling-backend", "pytorch"),
            *("--json-model-override-args", f'{{"num_hidden_layers": {LAYERS}}}'),
            *("--cuda-graph-max-bs-decode", "8", "--cuda-graph-bs-prefill", str(LENGTH)),
        )
    return [
        ServerSpec(
            name=name,
            model=model.path,
            device=device,
            threads=4 if on_gpu else 1,
            max_total_tokens=8192,
            mem_fraction=0.85 if on_gpu else 0.1,
            args=(*args, *more),
        )
        for name, args in ARMS.items()
    ]


def of_servers(
    servers: Sequence[Server], prompt: Callable[..., list[int]], repeats: int
) -> dict[str, Any]:
    """By server: TTFT in turns with the others and alone, and what its answers say of time."""
    for server in servers:
        for _ in range(4):
            server.ask(prompt(1024))
    answers: dict[str, list[Any]] = {server.spec.name: [] for server in servers}
    for turn in range(-4, repeats):
        ids, first = prompt(), turn % len(servers)
        for server in (*servers[first:], *servers[:first]):
            answer = server.ask(ids)
            if turn >= 0:
                answers[server.spec.name].append(answer)
    plain = [answer.ttft_s for answer in answers[servers[0].spec.name]]
    out = {name: _against(plain, each) for name, each in answers.items()}
    for server in servers:
        alone = statistics.median(server.ask(prompt()).ttft_s for _ in range(repeats))
        out[server.spec.name]["alone_ttft_p50_ms"] = round(1e3 * alone, 3)
    return out


def _against(plain: Sequence[float], answers: Sequence[Any]) -> dict[str, Any]:
    pairs = [(one.ttft_s, other) for one, other in zip(answers, plain, strict=True)]
    ratios = [mine / other for mine, other in pairs]
    e2e = [one.meta["e2e_latency"] for one in answers]
    return {
        "ttft_p50_ms": round(1e3 * statistics.median(mine for mine, _ in pairs), 3),
        "more_p50_ms": round(1e3 * statistics.median(mine - other for mine, other in pairs), 3),
        "ratio_p50": round(statistics.median(ratios), 4),
        "ci95": bootstrap_ci95(ratios),
        "e2e_p50_ms": round(1e3 * statistics.median(e2e), 3),
    }


@contextlib.contextmanager
def _labs(model: models.Model, device: str, backend: str) -> Iterator[dict[str, Future[Any]]]:
    """Labs of the whole model, while they start."""
    from lab import Lab  # of the tests: see env.py

    settings: dict[str, Any] = {
        "device": device, "attention_backend": backend, "load_format": "dummy",
        "max_total_tokens": 8192, "chunked_prefill_size": 8192, "context_length": 8192,
    }  # fmt: skip
    if device != "cpu":
        settings |= {
            "dtype": "bfloat16", "sampling_backend": "pytorch", "mem_fraction_static": 0.85,
            "max_running_requests": 2048, "cuda_graph_max_bs_decode": 8,
            "cuda_graph_bs_prefill": [LENGTH], "disable_overlap_schedule": False,
            "json_model_override_args": f'{{"num_hidden_layers": {LAYERS}}}',
            "env": {"SGLANG_USE_CPU_ENGINE": "0"},
        }  # fmt: skip
    with ThreadPoolExecutor(len(LABS)) as pool:
        starting = {
            name: pool.submit(Lab, model.path, **settings, **more) for name, more in LABS.items()
        }
        try:
            yield starting
        finally:
            for lab in starting.values():
                if lab.exception() is None:
                    lab.result().close()


def of_lab(lab: Any, prompt: Callable[..., list[int]], repeats: int) -> dict[str, Any]:
    """What a prompt takes there, its kernels, and where Python was meanwhile."""
    lab.ask("gpu_probes:prepare")

    def ask() -> float:
        ids, begun = prompt(), time.perf_counter()
        lab.one(ids, new=1)
        return time.perf_counter() - begun

    for _ in range(8):
        ask()
    seconds = statistics.median(ask() for _ in range(repeats))
    lab.ask("gpu_probes:start_profile")
    ask()
    found = {"p50_ms": round(1e3 * seconds, 3), **lab.ask("gpu_probes:stop_profile")}
    lab.ask("gpu_probes:start_host_profile")
    for _ in range(repeats):
        ask()
    return {**found, "functions": lab.ask("gpu_probes:stop_host_profile", repeats, 150)}
