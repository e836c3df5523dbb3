"""Exact twins of requests that reused, run while the server is idle: what reuse does to answers.

The distribution of the first token is kept as the request's prefill ends. Its twin is one prefill
of the same prompt that reads and leaves nothing in the cache. It runs within one call from SGLang's
idle loop: no queue, no stream and no counter of SGLang's ever sees it, so nothing that happens to
requests can happen to it. What twins say is judged in ``policy/shadow.py``.
"""

import functools
import logging
from array import array
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.shadow import Gate, Twin
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.report import Report
from kvshare_sglang.runtime.request import reuse_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

MOST_WAITING = 8  # twins; each holds a distribution over the vocabulary on the device
SWITCH = "kvshare_reuse"  # what POST /set_internal_state takes under server_args: 0 or 1


class Watched(NamedTuple):
    """A request of a batch that gets a twin, its row among the batch's logits, its prompt and a
    hash of that."""

    row: int
    req: "Req"
    ids: Any
    prompt: int


class Waiting(NamedTuple):
    """A twin to come: its prompt and a hash of that, and log-probabilities [vocab] (fp32) of the
    token that reuse would have it begin with."""

    ids: Any
    prompt: int
    logprobs: torch.Tensor


class Shadow:
    """Of one scheduler. ``gate`` says whether requests that say nothing may reuse."""

    def __init__(self, config: KVShareConfig, report: Report) -> None:
        self.gate = Gate(share=config.shadow, floor=config.shadow_floor)
        self._default, self._budget, self._report = config.default, config.budget, report
        self._waiting: deque[Waiting] = deque()

    @property
    def default(self) -> str:
        """What requests get that do not say, at this moment."""
        return "exact" if self.gate.closed else self._default

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def watch(
        self, batch: "ScheduleBatch", fb: "ForwardBatch"
    ) -> Callable[[torch.Tensor | None], None] | None:
        """What wants to see a prefill batch's logits [requests, vocab], once it ran: some of the
        requests whose prompts end in it get a twin. Twins say what the server's own budget does to
        answers, so requests that named another get none; nor does a prompt that is judged already
        (samples, repeats)."""
        if not self.gate.share:
            return None
        found: list[Watched] = []
        lengths = zip(fb.extend_prefix_lens_cpu, fb.extend_seq_lens_cpu, strict=True)
        for row, (req, (start, length)) in enumerate(zip(batch.reqs, lengths, strict=True)):
            state = reuse_of(req)
            if state is None or state.plan is None or state.told or state.budget != self._budget:
                continue
            if not req.sampling_params.max_new_tokens:  # no token is taken
                continue
            if start + length == state.plan.prompt_len and self.gate.takes():
                ids = req.full_untruncated_fill_ids[: start + length]
                prompt = hash((versions.namespace(req), array("q", ids).tobytes()))
                if not self._is_judged(prompt, found):
                    found.append(Watched(row, req, ids, prompt))
        return functools.partial(self._note, found) if found else None

    def _is_judged(self, prompt: int, found: list[Watched]) -> bool:
        """Whether a twin of the prompt ran of late, waits, or is among ``found``."""
        coming = [one.prompt for one in found] + [one.prompt for one in self._waiting]
        return prompt in coming or self.gate.knows(prompt)

    def _note(self, watched: list[Watched], logits: torch.Tensor | None) -> None:
        """Keep what requests would begin with, but for those that reused nothing in the end."""
        for row, req, ids, prompt in watched:
            if reuse_of(req) is None or logits is None:
                continue
            if len(self._waiting) == MOST_WAITING:
                self._report.shadow_dropped("queue_full")
                continue
            try:
                logprobs = logits[row].float().log_softmax(-1)
                self._waiting.append(Waiting(ids, prompt, logprobs))
            except Exception:  # the request itself must go on
                logger.exception("KVShare could not keep what request %s begins with", req.rid)
                self._report.shadow_dropped("fault")

    def run_one(self, scheduler: Any) -> None:
        """Run the twin that waits longest, on an idle scheduler. Raises nothing."""
        waiting = self._waiting.popleft()
        cache = scheduler.tree_cache
        free = scheduler.token_to_kv_pool_allocator.available_size()
        if len(waiting.ids) + cache.page_size > free + cache.evictable_size():
            self._report.shadow_dropped("no_room")
            return
        try:
            logits = versions.prefill_once(scheduler, waiting.ids)
            exact = logits.float().log_softmax(-1)
            kl = float((exact.exp() * (exact - waiting.logprobs)).sum())
            agrees = bool(exact.argmax() == waiting.logprobs.argmax())
        except Exception:
            logger.exception("KVShare could not run an exact twin")
            self._report.shadow_dropped("fault")
            return
        self._judge(Twin(agrees, max(0.0, kl), waiting.prompt))

    def new_weights(self) -> None:
        """Twins of the old ones could not be run, and what they said no longer counts."""
        for _ in self._waiting:
            self._report.shadow_dropped("new_weights")
        self._waiting.clear()
        if self.gate.closed and not self.gate.by_hand:
            logger.info("KVShare: reuse is switched on, for new weights")
        self.gate.forget()
        self._report.shadow_state(self.gate)

    def switch(self, *, on: bool) -> None:
        """By hand; stays so with new weights."""
        self.gate.switch(on=on)
        self._report.shadow_state(self.gate)
        logger.info("KVShare: reuse is switched %s", "on" if on else "off")

    def _judge(self, twin: Twin) -> None:
        gate = self.gate
        closes = gate.add(twin)
        self._report.shadowed(twin, gate)
        if closes:
            logger.warning(
                "KVShare switches reuse off for requests that do not ask for it: the first token "
                "was that of full prefill in only %d of the last %d twins, --kvshare-shadow-floor "
                'is %g. Switch it on again: POST /set_internal_state {"server_args": {"%s": 1}}',
                gate.agreeing,
                gate.twins,
                gate.floor,
                SWITCH,
            )


def hook_on_idle(original: Callable[..., Any], scheduler: Any, *args: Any, **kw: Any) -> Any:
    """AROUND ``Scheduler.on_idle``: answers are sent, so what they left is indexed now; the next
    request would wait for it. While twins wait, the loop goes round without SGLang's own part,
    looks for requests in between, and does not sleep."""
    fuzzy = getattr(scheduler.tree_cache, "fuzzy", None)
    try:
        if fuzzy is not None:
            fuzzy.settle()
    except Exception:
        logger.exception("KVShare could not index what answers left; some of it is not found")
    shadow: Shadow | None = getattr(scheduler.tree_cache, "shadow", None)
    if shadow is not None and shadow.num_waiting and _may_run(scheduler):
        shadow.run_one(scheduler)
        if shadow.num_waiting:
            return None
    return original(scheduler, *args, **kw)


def _may_run(scheduler: Any) -> bool:
    """Not while weights or KV are given back to the device (``/release_memory_occupation``), nor in
    a session of weight updates."""
    updater = scheduler.weight_updater
    whole = not updater.offload_tags and not versions.is_updating_weights(updater)
    return whole and bool(scheduler.is_fully_idle())


def hook_set_internal_state(
    original: Callable[..., Any], scheduler: Any, recv_req: Any, *args: Any, **kw: Any
) -> Any:
    """AROUND ``Scheduler.set_internal_state``: what ``POST /set_internal_state`` calls. Like
    SGLang's own settings, a value that is not one of ours is logged and nothing is updated."""
    shadow: Shadow | None = getattr(scheduler.tree_cache, "shadow", None)
    if shadow is None or SWITCH not in recv_req.server_args:
        return original(scheduler, recv_req, *args, **kw)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    value = recv_req.server_args[SWITCH]
    if value not in (0, 1) or len(recv_req.server_args) > 1:
        logger.warning("%s must be 0 or 1, and alone, got %s", SWITCH, recv_req.server_args)
        return SetInternalStateReqOutput(updated=False)
    shadow.switch(on=bool(value))
    return SetInternalStateReqOutput(updated=True)
