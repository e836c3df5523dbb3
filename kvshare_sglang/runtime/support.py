"""What is served: one table for servers, models and requests. The README's list is made from it.

A server setting that is not served is *refused* at start, with what to drop; a request that is not
served is *declined*: it takes the exact path, and says why; where only the selector asked for is
not served, another one chooses, and the answer says which and why.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import UnsupportedError
from kvshare_sglang.policy.admit import RequestView
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.policy.select.base import Selector
from kvshare_sglang.policy.select.dhd import Dhd
from kvshare_sglang.policy.select.window import Window
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.cache.radix import Choosing
from kvshare_sglang.runtime.hooks import BACKEND
from kvshare_sglang.runtime.report import Fallback

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")


class Setting(NamedTuple):
    """A field of SGLang's ServerArgs: with these values it is served, or with these it is not."""

    name: str
    what: str
    served: tuple[Any, ...] = (False,)
    refused: tuple[Any, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def serves(self, value: Any) -> bool:
        if self.refused:
            return value not in self.refused
        return value in self.served or (value is None and None not in self.served)


ONE = (1,)
NONE = (None,)
KV_DTYPES = ("auto", "bfloat16", "bf16", "float16", "float32", "fp8_e4m3", "fp8_e5m2")
SETTINGS = (
    Setting("tp_size", "tensor parallelism", ONE),
    Setting("dp_size", "data parallelism", ONE),
    Setting("pp_size", "pipeline parallelism", ONE),
    Setting("ep_size", "expert parallelism", ONE),
    Setting("attn_cp_size", "context parallelism", ONE),
    Setting("dcp_size", "decode context parallelism", ONE),
    Setting("attn_dp_size", "attention data parallelism", ONE),
    Setting("nnodes", "several nodes", ONE),
    Setting("enable_kv_cache_sharding", "KV cache sharding"),
    Setting("disaggregation_mode", "disaggregation", ("null", None)),
    Setting("enable_hierarchical_cache", "HiCache"),
    Setting("hicache_storage_backend", "HiCache storage", NONE),
    Setting("enable_lmcache", "LMCache"),
    Setting("enable_flexkv", "FlexKV"),
    Setting("enable_unified_cache_external_linker", "external cache storage"),
    Setting("enable_hisparse", "HiSparse"),
    Setting("enable_unified_memory", "unified memory"),
    Setting("kv_events_config", "KV events", NONE),
    Setting("speculative_algorithm", "speculative decoding", NONE),
    Setting("dllm_algorithm", "diffusion models", NONE),
    Setting("enable_streaming_session", "streaming sessions"),
    Setting("enable_session_radix_cache", "session radix caches"),
    Setting("enable_deterministic_inference", "deterministic mode"),
    Setting("enable_pdmux", "PD multiplexing"),
    Setting("enable_two_batch_overlap", "two-batch overlap"),
    Setting("strip_thinking_cache", "stripped thinking caches"),
    Setting("enable_beam_search", "beam search"),
    Setting("enable_return_aux_hidden_states", "auxiliary hidden states"),
    Setting("enable_nvidia_megakernel", "megakernels"),
    Setting("enable_amd_monokernel", "megakernels"),
    Setting("disable_radix_cache", "a disabled radix cache"),
    Setting("is_embedding", "embedding models"),
    Setting("kv_cache_dtype", "this KV cache dtype", KV_DTYPES),
    Setting("radix_cache_backend", "another cache backend", (None, BACKEND)),
    Setting("radix_eviction_policy", "T-LRU eviction", refused=("tlru",)),
)


# With ``--schedule-policy kvshare`` alone.
WITH_OUR_ORDER = (
    Setting("enable_priority_scheduling", "priority scheduling with --schedule-policy kvshare"),
)

# Judged where the model is: SGLang may choose backends and layouts itself.
TWO_BACKENDS = "different attention backends for prefill and decode"
SLIDING = "sliding-window and Mamba models"
SHORT_TABLE = "a RoPE table shorter than the context"
HEADS_FIRST = "a KV cache with heads before tokens"


def check_settings(server_args: "ServerArgs", settings: tuple[Setting, ...] = SETTINGS) -> None:
    """Raise UnsupportedError for the first setting that is not served; fields that this SGLang
    does not have are."""
    for setting in settings:
        if not hasattr(server_args, setting.name):
            continue
        value = getattr(server_args, setting.name)
        if not setting.serves(value):
            raise UnsupportedError(setting.what, f"{setting.flag} (got {value!r})")


def check_architecture(hf_config: Any) -> None:
    """Raise UnsupportedError unless the checkpoint's architecture is one that is served."""
    arch = (getattr(hf_config, "architectures", None) or ["unknown"])[0]
    if arch not in ARCHITECTURES:
        raise UnsupportedError(f"the architecture {arch}", "--kvshare or the model")


def check_model(runner: "ModelRunner", ctx: Any = None) -> None:
    """Raise UnsupportedError unless the model is one whose K can be re-rotated."""
    check_architecture(runner.model_config.hf_config)
    sliding = getattr(runner, "sliding_window_size", None)
    if (ctx is not None and (ctx.is_hybrid_swa or ctx.is_hybrid_ssm)) or sliding not in (None, -1):
        raise UnsupportedError(SLIDING, "--kvshare or the model")
    # It calls the backends inside it, so nothing of ours in front of it would ever run.
    if isinstance(getattr(runner, "attn_backend", None), HybridAttnBackend):
        raise UnsupportedError(
            TWO_BACKENDS,
            "--prefill-attention-backend and --decode-attention-backend",
        )
    layers = runner.model.model.layers
    rotary = {id(layer.self_attn.rotary_emb) for layer in layers}
    table = getattr(layers[0].self_attn.rotary_emb, "cos_sin_cache", None)
    if len(rotary) != 1 or not isinstance(table, torch.Tensor):
        raise UnsupportedError("models without one RoPE table", "--kvshare or the model")
    # SGLang makes the table as long as the context, so no request has a position past its end.
    if len(table) < runner.model_config.context_len:
        raise UnsupportedError(SHORT_TABLE, "--context-length")
    # Copies address K and V as [slot, head, dim].
    if getattr(runner.token_to_kv_pool, "kv_cache_layout", "nhd") != "nhd":
        raise UnsupportedError(HEADS_FIRST, "SGLANG_USE_HND_KVCACHE")


def choosing(config: KVShareConfig, runner: "ModelRunner") -> Choosing:
    """Who chooses rows on this server."""
    structural = Window(config.seam, config.window)
    selectors: dict[str, Selector] = {
        "window": structural,
        "trace": AttentionTrace(config.seam, config.stretch),
        "dhd": Dhd(config.seam, config.window, config.tau),
    }
    unserved = None
    if config.select != "window":
        if getattr(runner, "lora_manager", None) is not None:
            unserved = Fallback.LORA
        elif runner.token_to_kv_pool.get_key_buffer(0).dtype.itemsize == 1:
            unserved = Fallback.FP8_CACHE
    if config.select == "dhd" and config.check_layer + 1 >= len(runner.model.model.layers):
        unserved = Fallback.CHECK_LAYER
    return Choosing(selectors[config.select], structural, unserved)


def view_of(req: "Req", mode: str) -> RequestView:
    """What admission may see of a request."""
    # Planned anew after it was retracted, its answer so far is prompt too, and SGLang computes the
    # logprobs of that once more.
    length = max(len(req.origin_input_ids), len(req.full_untruncated_fill_ids))
    # Below -1 SGLang takes a start for the first token that is not cached.
    prompt_logprobs = req.return_logprob and -1 != req.logprob_start_len < length
    return RequestView(
        mode=mode,
        lora=req.lora_id is not None,
        prompt_logprobs=bool(prompt_logprobs),
        hidden_states=bool(req.return_hidden_states),
        # Scores; without them it fills the cache, for itself or for ``n`` answers that follow.
        prefill_only=bool(req.is_prefill_only and (req.return_logprob or _pools(req))),
        multimodal=(
            req.multimodal_inputs is not None
            or req.input_embeds is not None
            or versions.brings_embeddings(req)
        ),
        session=getattr(req, "session", None) is not None,
        beam_search=getattr(req, "beam_group", None) is not None,
    )


def _pools(req: "Req") -> bool:
    return getattr(req, "token_indices_to_pool", None) is not None


def is_by_token(req: "Req") -> bool:
    """Whether a request has inputs or outputs for each of its tokens: a batch with it runs all of
    its rows at once."""
    view = view_of(req, "auto")
    return view.hidden_states or view.multimodal or view.prompt_logprobs


def needs_every_row(fb: Any, batch: Any) -> bool:
    """Whether any request of a batch has per-token inputs or outputs (hidden states, embeddings,
    images): cutting tokens would misalign them."""
    return (
        any(req.return_hidden_states for req in batch.reqs)
        or fb.input_embeds is not None
        or getattr(fb, "replace_embeds", None) is not None
        or any(mm is not None for mm in fb.mm_inputs or ())
    )


# What requests are called in the table, where their field's name would not do.
DECLINED = {"lora": "LoRA adapters", "prefill_only": "scores without an answer"}


def as_markdown() -> str:
    """The README's table of limits."""
    settings = [setting.what for setting in (*SETTINGS, *WITH_OUR_ORDER)]
    at_the_model = [TWO_BACKENDS, SLIDING, SHORT_TABLE, HEADS_FIRST]
    refused = ", ".join(dict.fromkeys([*settings, *at_the_model]))
    names = [name for name in RequestView._fields if name != "mode"]
    declined = ", ".join(DECLINED.get(name, name.replace("_", " ")) for name in names)
    rows = (
        ("models", "served", ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
         + " (dense, one RoPE table with its scalings); others are refused at start"),
        ("server settings", "refused at start, with the flag to drop", refused),
        ("requests", "take the exact path, counted by reason", declined),
        ("selectors", "`window` chooses instead, named in the answer",
         "LoRA servers, fp8 KV caches; for `dhd` also prompts whose rows need several chunks"),
    )  # fmt: skip
    lines = ["| what | how | which |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {a} | {b} | {c} |" for a, b, c in rows)])
