"""Where the time of one partial prefill goes: kernels, the gaps between them, and the host."""

from typing import Any

import numpy as np

from kvshare_sglang.bench import models
from kvshare_sglang.bench.ttft.cases import moved_case, random_tokens

MISSES = 20


def run(device: str, backend: str, select: str) -> dict[str, Any]:
    """A prompt of which nearly all is cached elsewhere, in the second of two tries."""
    from lab import lab  # of the tests: see env.py

    on_gpu = device != "cpu"
    model = models.open_model("llama-8b" if on_gpu else "replay-5m", dummy=True)
    size = 16384 if on_gpu else 512
    vocab = min(model.vocab_size, 4096)
    settings: dict[str, Any] = {
        "device": device, "attention_backend": backend, "load_format": "dummy",
        "kvshare": True, "kvshare_select": select, "kvshare_budget": 0.05,
        "max_total_tokens": 3 * size, "chunked_prefill_size": size, "context_length": 2 * size,
    }  # fmt: skip
    if on_gpu:
        settings |= {
            "dtype": "bfloat16", "sampling_backend": "pytorch", "mem_fraction_static": 0.85,
            "max_running_requests": 2048, "max_prefill_tokens": size,
            "cuda_graph_max_bs_decode": 8,
            "cuda_graph_bs_prefill": [256, 512, 640, 1024, 1280, 4096],
            "disable_overlap_schedule": False, "env": {"SGLANG_USE_CPU_ENGINE": "0"},
        }  # fmt: skip
    with lab(model.path, **settings) as it:
        it.ask("gpu_probes:prepare")
        for turn in range(2):
            case = moved_case(np.random.default_rng(turn), size, vocab, reused=0.98)
            _prime(it, case.sources)
            prompt = case.prompt.tolist()
            if turn:
                it.ask("gpu_probes:start_profile")
            told = it.one(prompt, new=1)["kvshare"]
        figures = it.ask("gpu_probes:stop_profile")
        it.ask("gpu_probes:compare_passes")
        _prime(it, case.sources)
        it.one(prompt, new=1)
        off = figures["replayed passes off"] = it.ask("gpu_probes:passes_off")
        it.ask("gpu_probes:compare_no_more")
        figures["host"] = [_of_host(it, case.sources, prompt), _of_misses(it, vocab)]
    replayed = select != "trace" or bool(off)  # a trace whose passes no graph served is another
    return {"ok": told["declined"] is None and replayed, "kvshare": told, "figures": figures}


def _of_host(it: Any, sources: list[Any], prompt: list[int]) -> dict[str, Any]:
    """The same prompt again, as the host saw it."""
    _prime(it, sources)
    it.ask("gpu_probes:start_host_profile")
    it.one(prompt, new=1)
    return {"what": "the prompt", "functions": it.ask("gpu_probes:stop_host_profile")}


def _prime(it: Any, sources: list[Any]) -> None:
    """Nothing is cached but the sources."""
    it.flush()
    for source in sources:
        it.one(source.tolist(), new=1, kvshare="exact")


def _of_misses(it: Any, vocab: int) -> dict[str, Any]:
    """Prompts with nothing to reuse, as the host saw them."""
    rng = np.random.default_rng(9)
    it.one(random_tokens(rng, 384, vocab).tolist(), new=1)
    it.ask("gpu_probes:start_host_profile")
    for _ in range(MISSES):
        it.one(random_tokens(rng, 384, vocab).tolist(), new=1)
    functions = it.ask("gpu_probes:stop_host_profile", MISSES)
    return {"what": "prompts of 384 tokens with nothing to reuse", "functions": functions}
