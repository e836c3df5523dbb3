"""Run more rows than a chunk holds in several passes: SGLang sizes its activations by the chunk.

A batch is charged the rows that it is to run (``charging.py``) and may hold many times the tokens.
It runs more where a copy or a trace failed, where sources were given back, or where attention
takes few ranges. KV is stored in place, so a prompt's later rows see what its earlier ones wrote.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kvshare_sglang.plan import Rows
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.batch import BatchReuse, DeviceRows, cut_tokens, on_host

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def told_rows(fb: "ForwardBatch", reuse: BatchReuse | None) -> BatchReuse | None:
    """What a prefill batch carries: its rows also where SGLang's own would run, but as more than a
    chunk, which SGLang itself never builds."""
    chunk = versions.chunk_size()
    if reuse is not None or chunk is None or fb.extend_num_tokens <= chunk:
        return reuse
    lengths = zip(fb.extend_prefix_lens_cpu, fb.extend_seq_lens_cpu, strict=True)
    return BatchReuse(rows=[Rows([(start, start + length)]) for start, length in lengths])


def passes(fb: Any, runner: "ModelRunner") -> Iterator[Any]:
    """The batches to run for ``fb``, one after the other: mostly itself alone. The last one is
    ``fb``, cut to the rows that are left; its logits are the batch's."""
    reuse: BatchReuse | None = getattr(fb, "kvshare", None)
    plain = reuse is None or reuse.rows is None or reuse.observer is not None
    chunk = None if plain else versions.chunk_size()
    if reuse is None or reuse.rows is None or chunk is None:
        yield fb
        return
    if any(isinstance(one, DeviceRows) for one in reuse.rows):  # they fit, or would be known
        yield fb
        return
    rows = on_host(reuse.rows)
    parts = sliced(rows, most=chunk, whole=_with_logprobs(fb))
    for part in parts[:-1]:
        view = copy.copy(fb)
        view.return_logprob = False
        view.top_logprobs_nums = view.token_ids_logprobs = None
        cut_tokens(view, rows, part, runner)
        view.kvshare = BatchReuse(rows=part)
        yield view
    if len(parts) > 1:
        cut_tokens(fb, rows, parts[-1], runner)
        fb.kvshare = BatchReuse(rows=parts[-1])
    yield fb


def _with_logprobs(fb: Any) -> set[int]:
    """Which requests of a batch want logprobs of their prompt: SGLang looks for them in one pass.
    They were charged whole."""
    if not fb.return_logprob:
        return set()
    wanted = zip(fb.extend_logprob_start_lens_cpu, fb.extend_seq_lens_cpu, strict=True)
    return {i for i, (start, length) in enumerate(wanted) if start < length}


def sliced(rows: Sequence[Rows], *, most: int, whole: Collection[int] = ()) -> list[list[Rows]]:
    """The rows of a batch, by request, in parts of at most ``most`` rows, or one more than there
    are requests. Ascending; each part has a row of every request, its last one if no other, and
    the last part has the last row of all. No part has more ranges than ``rows``. Of requests in
    ``whole`` the last part has every row, and may be larger for that.

    >>> sliced([Rows([(0, 5)]), Rows([(7, 9)])], most=4)
    [[Rows([(0, 2)]), Rows([(8, 9)])], [Rows([(2, 4)]), Rows([(8, 9)])], [Rows([(4, 5)]), \
Rows([(7, 9)])]]
    >>> sliced([Rows([(0, 5)]), Rows([(7, 9)])], most=4, whole={1})
    [[Rows([(0, 2)]), Rows([(8, 9)])], [Rows([(2, 3)]), Rows([(8, 9)])], [Rows([(3, 5)]), \
Rows([(7, 9)])]]
    """
    if sum(one.num for one in rows) <= max(most, len(rows) + 1):
        return [list(rows)]
    counts = [0 if i in whole else one.num - 1 for i, one in enumerate(rows)]
    stops = np.cumsum(counts)
    total, room = int(stops[-1]), max(most - len(rows), 1)
    at_the_end = sum(one.num - 1 for i, one in enumerate(rows) if i in whole)
    starts = list(range(0, total, room)) or [0]
    left = total - starts[-1]
    if left > max(room - at_the_end, 0) and at_the_end:
        starts.append(total - max(room - at_the_end, 0))
    parts = []
    for at, end in pairwise([*starts, total]):
        part, last = [], at == starts[-1]
        for i, (one, stop, count) in enumerate(zip(rows, stops, counts, strict=True)):
            start = stop - count
            mine = one.positions[max(at - start, 0) : max(min(end, stop) - start, 0)]
            if i in whole and last:
                mine = one.positions[:-1]
            if last or not len(mine):
                mine = np.append(mine, one.positions[-1])
            part.append(Rows.at(mine))
        parts.append(part)
    return parts
