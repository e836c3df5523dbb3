"""New text of a traced prompt runs its lower layers once: what the first pass gave is carried on.

::

    layers      first pass      rest of the passes   the batch
    above                                            all rows
    up to probe all new text    rows found           rows found, the question

A third of a prompt that is new costs as much in the first pass as the copies save. What it gives
there is kept, and the batch takes it in where the pass ended (``attention.watch_entry``).
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvshare_sglang.plan import Rows
from kvshare_sglang.runtime import attention, versions
from kvshare_sglang.runtime.batch import (
    BatchReuse,
    Entry,
    Wider,
    keep_tokens,
    on_cpu,
    put_tokens,
    tokens_of,
)

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


logger = logging.getLogger(__name__)


class First(NamedTuple):
    """What entered the probe layer in the first pass of a trace: of its ``rows``, ``hidden`` and
    ``residual`` [rows, size]."""

    rows: Rows
    hidden: torch.Tensor
    residual: torch.Tensor


def serves(fb: "ForwardBatch", runner: "ModelRunner", layer: int) -> bool:
    """Whether layers run one by one, so that rows may join between them, and no request of the
    batch wants logprobs. On a GPU layers are parts of graphs, and passes are recorded."""
    if fb.return_logprob:
        return False
    if not on_cpu(runner) or attention.has_kernel(runner):
        return False
    if not runner.attn_backend.kvshare.carries:
        return False
    # Hooks on layers would make compiled ones compile anew.
    return layer > 0 and not runner.decode_cuda_graph_runner


def firsts_of(entry: Entry, rows: Sequence[Rows], runner: "ModelRunner") -> list[First]:
    """By trace; none where the layer was not entered as expected."""
    if entry.hidden is None or entry.residual is None:
        logger.warning(
            "KVShare: layer %d is not entered as known; new text runs twice", entry.layer
        )
        runner.attn_backend.kvshare.carries = False
        return []
    sizes = [one.num for one in rows]
    parts = zip(rows, entry.hidden.split(sizes), entry.residual.split(sizes), strict=True)
    return [First(*part) for part in parts]


def run(
    fb: "ForwardBatch",
    rows: Sequence[Rows],
    kept: dict[int, tuple[Rows, First]],
    runner: "ModelRunner",
    forward: Any,
    *,
    layer: int,
) -> Any:
    """Run the batch, which holds ``rows``. ``kept``, by request: rows that join in ``layer``, and
    what entered it in the first pass."""
    chunk = versions.chunk_size()
    total = sum(one.num for one in rows)
    if not kept or (chunk is not None and total > chunk):
        fb.kvshare = BatchReuse(rows=rows)
        return forward(fb)
    tokens = tokens_of(fb)
    try:
        reuse = fb.kvshare = _narrowed(fb, rows, kept, runner, tokens)
        out = forward(fb)
        if reuse.joined:
            return out
        logger.error("KVShare: layer %d was not entered as before; new text runs twice now", layer)
    except Exception:
        logger.exception("KVShare could not carry new text on; it runs twice now")
    finally:
        put_tokens(fb, tokens)
    runner.attn_backend.kvshare.carries = False
    fb.kvshare = BatchReuse(rows=rows)
    return forward(fb)


def _narrowed(
    fb: "ForwardBatch",
    rows: Sequence[Rows],
    kept: dict[int, tuple[Rows, First]],
    runner: "ModelRunner",
    tokens: dict[str, Any],
) -> BatchReuse:
    """Cut the batch down to the rows that run from the bottom; what it carries then."""
    (_, first), *_ = kept.values()
    total = sum(one.num for one in rows)
    hidden, residual = (
        first.hidden.new_empty((total, x.shape[1])) for x in (first.hidden, first.residual)
    )
    below, places, base = [], [], 0
    for i, mine in enumerate(rows):
        now = mine
        if i in kept:
            joins, first = kept[i]
            here = torch.from_numpy(base + joins.places_in(mine))
            there = torch.from_numpy(joins.places_in(first.rows))
            hidden[here], residual[here] = first.hidden[there], first.residual[there]
            now = mine - joins
        below.append(now)
        places.append(torch.from_numpy(base + now.places_in(mine)))
        base += mine.num
    picked = torch.cat(places)
    keep_tokens(fb, picked, [one.num for one in below], runner)
    return BatchReuse(rows=below, wider=Wider(rows, tokens, hidden, residual, picked))
