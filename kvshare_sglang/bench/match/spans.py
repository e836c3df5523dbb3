"""How much text requests share beyond prefixes, by how short a shared span may be. Pure.

Independent of the matcher, with a cache that forgets nothing: the most that any rule can find that
asks for spans of so many tokens.
"""

from itertools import accumulate
from typing import Any

from kvshare_sglang.bench.common import table
from kvshare_sglang.bench.match.ceiling import ceiling
from kvshare_sglang.bench.match.requests import Requests
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens

SPANS = (8, 12, 16, 32)
ENOUGH = KVShareConfig().min_reuse


def measure(files: list[Requests], spans: tuple[int, ...] = SPANS) -> dict[str, Any]:
    """By file and span: share of the tokens in the longest prefix of an earlier request, share in
    such spans of earlier ones behind it, and how many requests have ``ENOUGH`` of these to reuse.
    Namespaces are apart."""
    return {file.name: _of_file(file, spans) for file in files}


def _of_file(file: Requests, spans: tuple[int, ...]) -> list[dict[str, Any]]:
    known: dict[object, set[int]] = {}  # prefixes by namespace
    heads = [
        _head(prompt, known.setdefault(space, set()))
        for prompt, space in zip(file.prompts, file.spaces, strict=True)
    ]
    rows = []
    for span in spans:
        masks = ceiling(file.prompts, file.spaces, span=span)
        beyond = [int(mask[head:].sum()) for mask, head in zip(masks, heads, strict=True)]
        rows.append(
            {
                "span": span,
                "requests": len(heads),
                "prefix_share": sum(heads) / max(1, file.num_tokens),
                "beyond_share": sum(beyond) / max(1, file.num_tokens),
                "enough": sum(tokens >= ENOUGH for tokens in beyond),
            }
        )
    return rows


def _head(prompt: Tokens, known: set[int]) -> int:
    """Length of the longest prefix that is ``known``; all of them are from then on."""
    hashes = list(accumulate(prompt.tolist(), lambda head, token: hash((head, token)), initial=0))
    length = next((i for i, one in enumerate(hashes[1:]) if one not in known), len(prompt))
    known.update(hashes[1:])
    return length


def show(result: dict[str, Any]) -> str:
    head = ("spans", "tokens", "prefix", "beyond", f">= {ENOUGH} tokens")
    cells = [
        (name, str(r["span"]), f"{r['prefix_share']:.2%}", f"{r['beyond_share']:.2%}",
         f"{r['enough']} of {r['requests']}")
        for name, rows in result.items()
        for r in rows
    ]  # fmt: skip
    return table(head, cells)
