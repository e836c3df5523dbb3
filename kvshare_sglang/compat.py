"""All that differs between the SGLang versions we serve. Root layer: may import sglang.

0.5.17 keeps a request's KV row on the request itself and lets the cache free it
(``cache_finished_req``); from 0.5.18 on the row is ``req.kv`` and the scheduler frees it
(``insert_req``, ``free_kv_row``). 0.5.22 rebuilt the interface between requests and caches
(``checkpoint``, lock objects, no ``prefix_indices``) and is refused by name.
"""

from importlib import metadata
from typing import Any

from kvshare_sglang.errors import UnsupportedError

OLDEST = (0, 5, 17)
NEWEST = (0, 5, 21)


def sglang_version() -> tuple[int, ...]:
    """Version of the SGLang that is imported, as numbers."""
    import sglang

    text = getattr(sglang, "__version__", None) or metadata.version("sglang")
    numbers = []
    for part in text.split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def check_version() -> None:
    """Raise UnsupportedError for an SGLang outside the supported range."""
    have = sglang_version()
    if not OLDEST <= have <= NEWEST:
        lo, hi, mine = (".".join(map(str, v)) for v in (OLDEST, NEWEST, have))
        raise UnsupportedError(f"SGLang {mine}", f"it for a version in [{lo}, {hi}]")


def kv_row(req: Any) -> Any:
    """What holds ``req_pool_idx`` and ``cache_protected_len`` of a request."""
    return req.kv if hasattr(req.kv, "cache_protected_len") else req


def namespace(key: Any) -> tuple[Any, Any]:
    """What a key (RadixKey or Req) must share with a source: extra_key and cache_salt."""
    return key.extra_key, getattr(key, "cache_salt", None)


def make_key(token_ids: Any, like: Any, *, extra_key: Any = None) -> Any:
    """A RadixKey in the namespace of ``like`` (a request), or under ``extra_key``."""
    from sglang.srt.mem_cache.radix_cache import RadixKey

    if extra_key is not None:
        return RadixKey(token_ids, extra_key)
    extra, salt = namespace(like)
    return RadixKey(token_ids, extra, cache_salt=salt) if salt else RadixKey(token_ids, extra)


def set_num_tokens(fb: Any, num: int) -> None:
    """Tell a ForwardBatch how many tokens it has; 0.5.17 keeps the counts under shorter names."""
    prefix = "global_" if hasattr(fb, "global_num_token_non_padded_cpu") else ""
    setattr(fb, f"{prefix}num_token_non_padded_cpu", num)
    on_device = getattr(fb, f"{prefix}num_token_non_padded", None)
    if on_device is not None:
        on_device.fill_(num)
