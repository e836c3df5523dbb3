"""Tokens in doubt: where full prefill might have said another one, the prompt runs in full.

What reuse does to logits is noise: a greedy token whose margin over the next likeliest is larger is
full prefill's own. Where the margin of a request that reused is smaller than ``--kvshare-doubt``,
all rows behind its exact part run in one more pass, its answer so far included, before the token is
taken. From then on the request is exact, and so is what it leaves.
"""

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvshare_sglang.plan import Rows
from kvshare_sglang.runtime import felt, repair, versions
from kvshare_sglang.runtime.attention_trace import Forward
from kvshare_sglang.runtime.batch import Answering, Part, is_greedy, part_of_row, sub_batch
from kvshare_sglang.runtime.cache.index_sync import tokens_so_far
from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache
from kvshare_sglang.runtime.request import reuse_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

logger = logging.getLogger(__name__)

LEAST = 0.25  # of a doubt, wherever little moved


class Doubts:
    """The requests of one batch whose next token may be in doubt."""

    def __init__(self, asked: list[Answering], cache: FuzzyRadixCache) -> None:
        self._asked, self._cache = asked, cache

    def settle(
        self, fb: "ForwardBatch", logits: torch.Tensor, runner: "ModelRunner", forward: Forward
    ) -> None:
        """``logits`` [batch, vocab] are what ``fb`` gave and tokens are about to be taken from:
        those of requests in doubt become full prefill's. A fault leaves them as they are, and the
        requests ask no more. Waits for the device."""
        # Some reuse nothing after all; that is known once the batch ran.
        asked = [one for one in self._asked if one.state.plan and one.state.plan.inexact]
        if not asked:
            return
        try:
            for one in asked:
                self._feel(one, runner)
            at = torch.tensor([one.number for one in asked], device=logits.device)
            found = margins(as_taken(logits, fb.sampling_info)[at]).tolist()
            doubted = [
                one
                for one, margin in zip(asked, found, strict=True)
                if margin < one.state.doubt
                and not has_ended(one.req, one.length, int(fb.input_ids[_last_row(fb, one.number)]))
            ]
            if doubted:
                self._settle(doubted, fb, logits, runner, forward)
        except Exception:
            logger.exception("KVShare could not settle tokens in doubt; they stay what they are")
            for one in asked:
                self._stays(one, "fault")

    def _settle(
        self,
        doubted: list[Answering],
        fb: "ForwardBatch",
        logits: torch.Tensor,
        runner: "ModelRunner",
        forward: Forward,
    ) -> None:
        settled, parts = [], []
        for one in doubted:
            if getattr(runner, "lora_manager", None) is not None:
                self._stays(one, "lora")  # its segments are laid out for the batch
                continue
            part = self._part(one, fb, runner)
            if part is not None:
                settled.append(one)
                parts.append(part)
        if not settled:
            return
        kept = logits.clone()
        at = torch.tensor([one.number for one in settled], device=logits.device)
        try:
            exact = forward(sub_batch(fb, parts, None)).logits_output.next_token_logits
            kept[at] = exact.to(kept.dtype)
        finally:  # graphs write logits where those of the graph before are
            logits.copy_(kept)
        for one in settled:
            self._cache.retainer.make_exact(one.req, one.state, one.length)
        if logits.is_cuda:
            # Where a grammar delays sampling, the scheduler has waited for this stream already, and
            # its own goes on with the slots that we give back.
            torch.cuda.current_stream().synchronize()
        rows = sum(part.rows.num for part in parts)
        self._cache.report.settled(requests=len(settled), rows=rows)

    def _part(self, one: Answering, fb: "ForwardBatch", runner: "ModelRunner") -> Part | None:
        """All rows of a request behind its exact part, in slots of its own; None where memory does
        not have as many."""
        assert one.state.plan is not None
        rows = Rows([(one.state.plan.exact_len, one.length)])
        if not self._cache.retainer.make_room(one.req, one.state, rows):
            self._stays(one, "no_room")
            return None
        table = runner.req_to_token_pool.req_to_token[versions.kv_row(one.req).req_pool_idx]
        repair.own_slots(runner, one.req, one.state, table, rows)
        known = tokens_so_far(one.req)[: one.length]
        tokens = np.concatenate([known, np.zeros(one.length - len(known), known.dtype)])
        part = part_of_row(fb, one.number, rows, tokens=tokens, table=table)
        if len(known) < one.length:  # with the overlap scheduler the device alone knows the newest
            part.ids[-1] = fb.input_ids[_last_row(fb, one.number)]
        return part

    def _feel(self, one: Answering, runner: "ModelRunner") -> None:
        """Behind the prompt, once: how much of the doubt there is room for."""
        then, one.state.felt = one.state.felt, None
        if then is not None:
            moved = felt.shift(then, runner)
            one.state.doubt *= share_of(moved, whole=one.state.doubt_shift)
            one.state.record["doubt"] = round(one.state.doubt, 3)

    def _stays(self, one: Answering, why: str) -> None:
        """The request goes on as it is: what is in the way now will be for its next tokens."""
        one.state.doubt = 0.0
        self._cache.report.doubt_stays(why)


def watch(fb: "ForwardBatch", batch: "ScheduleBatch", cache: FuzzyRadixCache) -> Doubts | None:
    """Whose tokens of a batch may be in doubt: greedy ones (a drawn token is decided by no margin)
    of requests that reuse and whose prompts are through with it. None where there are none."""
    asked = []
    for number, req in enumerate(batch.reqs):
        state = reuse_of(req)
        if state is None or state.plan is None or not state.doubt or not is_greedy(req):
            continue
        length = int(fb.seq_lens_cpu[number])
        if length >= state.plan.prompt_len:
            asked.append(Answering(number, length, req, state))
    return Doubts(asked, cache) if asked else None


def share_of(shift: float, *, whole: float) -> float:
    """What there is of a doubt where the end of a prompt moved by ``shift``; all from ``whole`` on.

    >>> [share_of(shift, whole=0.2) for shift in (0.0, 0.1, 0.3)]
    [0.25, 0.5, 1.0]
    """
    return min(1.0, max(LEAST, shift / whole))


def as_taken(logits: torch.Tensor, sampling: "SamplingBatchInfo") -> torch.Tensor:
    """A copy of ``logits`` with what SGLang does to them before it takes a token: penalties, a
    bias, what a grammar allows. Not what a custom logit processor does: it may keep a state."""
    trial = logits.clone()
    sampling.update_regex_vocab_mask()
    sampling.apply_logits_bias(trial)
    return trial


def has_ended(req: "Req", length: int, newest: int) -> bool:
    """Whether a request was through with its newest token, the last of ``length``: with the overlap
    scheduler it is in one batch more. A stop string is not looked for."""
    asked = req.sampling_params
    answered = length - len(req.origin_input_ids)
    if req.finished() or answered >= asked.max_new_tokens:
        return True
    if answered <= 0 or asked.ignore_eos:
        return False
    ends = {*(asked.stop_token_ids or ()), *(req.eos_token_ids or ())}
    if req.tokenizer is not None:
        ends |= {req.tokenizer.eos_token_id, *(req.tokenizer.additional_stop_token_ids or ())}
    return newest in ends


def margins(logits: torch.Tensor) -> torch.Tensor:
    """By how many nats the likeliest token is ahead of the next: fp32 [n] of logits [n, vocab].

    >>> margins(torch.tensor([[1.0, 4.0, 2.5]])).tolist()
    [1.5]
    """
    top = logits.float().topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def _last_row(fb: "ForwardBatch", number: int) -> int:
    """Where among the batch's tokens the last one of a request is."""
    if fb.forward_mode.is_decode():
        return number
    return sum(fb.extend_seq_lens_cpu[: number + 1]) - 1
