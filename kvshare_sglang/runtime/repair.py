"""Rows of a prefill batch that are before its chunk: their tokens, and slots to write them to.

A request's last chunk may compute rows again that are before it. What the request owns is computed
in place. What the tree owns, the blended part of its prefix hit, others may be reading: such a row
gets a slot of the request's own first, out of those set aside at admission, page by page.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvshare_sglang.plan import Rows
from kvshare_sglang.runtime import copying, versions
from kvshare_sglang.runtime.batch import BatchedRequest, Part, part_of_row, to_device
from kvshare_sglang.runtime.cache.index_sync import as_tokens
from kvshare_sglang.runtime.request import RequestReuse

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class NoSlots(Exception):
    """Rows of a prefix hit are to run that have no slots of the request's own."""


def part_of(fb: "ForwardBatch", runner: "ModelRunner", job: BatchedRequest, rows: Rows) -> Part:
    """``rows`` of a request of the batch. Those before its chunk get slots that may be written.
    Raises NoSlots where there are not enough."""
    before, here = rows.clip(0, job.chunk.start), rows.clip(*job.chunk)
    places = torch.from_numpy(here.positions - job.chunk.start + job.base)
    places = to_device(places, fb.input_ids.device)
    ids, slots = fb.input_ids[places], fb.out_cache_loc[places]
    if before:
        table = runner.req_to_token_pool.req_to_token[versions.kv_row(job.req).req_pool_idx]
        own_slots(runner, job.req, job.state, table, before)
        tokens = as_tokens(job.req.full_untruncated_fill_ids)
        early = part_of_row(fb, job.number, before, tokens=tokens, table=table)
        ids, slots = torch.cat([early.ids, ids]), torch.cat([early.slots, slots])
    return Part(job.number, rows, ids, slots)


def own_slots(
    runner: "ModelRunner", req: "Req", state: RequestReuse, table: torch.Tensor, rows: Rows
) -> None:
    """Give those of ``rows`` that the tree owns slots of the request's own, and note them in
    ``table``, the request's row of slots. Raises NoSlots."""
    page = runner.token_to_kv_pool_allocator.page_size
    shared = rows.clip(0, versions.kv_row(req).cache_protected_len) - state.private
    if not shared:
        return
    pages = np.unique(shared.positions // page)
    positions = (pages[:, None] * page + np.arange(page)).ravel()
    spare = state.spare
    if spare is None or len(spare) < len(positions):
        have = 0 if spare is None else len(spare)
        raise NoSlots(f"{len(positions)} slots are needed, {have} were set aside")
    new, state.spare = spare[: len(positions)], spare[len(positions) :]
    where = to_device(torch.from_numpy(positions), table.device)
    # The rest of a page stays what it is, and so do all rows where the choice fails half way.
    old = table[where].to(torch.int64)
    copying.copy_kv(runner, copying.Copy(old, new, where, where))
    table[where] = new.to(table.dtype)
    state.private |= Rows.at(positions)
