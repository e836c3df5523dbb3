"""Keep some tokens of a prefill batch: requests stay, tokens shrink; and views of a batch.

``BatchReuse`` is the one thing that a ForwardBatch carries for us.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from kvshare_sglang.plan import Range, ReusePlan, Rows, merge_ranges
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.request import RequestReuse

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

_COUNTS = ("global_num_token_non_padded", "num_token_non_padded")


class StopForward(BaseException):
    """Ends a forward pass at the layer that it was for. No Exception: SGLang would log one that
    leaves a graph as an error, with advice."""


class Stop:
    """What an observer returns to end the pass in its layer."""


STOP = Stop()


class LayerView(NamedTuple):
    """What an observer sees of its layer: ``q`` [rows, q_heads, dim], ``k`` and ``v``
    [rows, kv_heads, dim], all of the batch's rows, rotated; ``keys(i, n)``: K [n, kv_heads, dim]
    of the first n tokens of request i, this batch's rows included. ``k``, ``v`` are None in
    decode."""

    layer: "RadixAttention"
    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    keys: Callable[[int, int], torch.Tensor]
    scaling: float


class LayerObserver(Protocol):
    """Looks at the attention of one layer of a forward pass. ``narrows``: it may let only some
    rows go on."""

    layer: int
    narrows: bool

    def observe(self, view: LayerView) -> Sequence[Rows] | Stop | None:
        """None: go on. Rows, by request: only these go on to the next layers. STOP: the pass
        ends here. Must not raise."""
        ...


class Stage(Protocol):
    """Runs a batch in more than one pass; ``forward`` runs one."""

    def run(
        self, fb: "ForwardBatch", runner: "ModelRunner", forward: Callable[[Any], Any]
    ) -> Any: ...


@dataclass
class Entry:
    """Keeps what enters ``layer``: ``hidden`` and ``residual`` [rows, size], of all rows."""

    layer: int
    hidden: torch.Tensor | None = None
    residual: torch.Tensor | None = None


class Wider(NamedTuple):
    """From the layer that is watched on a batch runs ``rows``, whose ``tokens`` are fields of a
    ForwardBatch. What enters the layer, ``hidden`` and ``residual`` [rows, size], is there but for
    the rows that the batch has run so far, which belong at ``places``."""

    rows: Sequence[Rows]
    tokens: dict[str, Any]
    hidden: torch.Tensor
    residual: torch.Tensor
    places: torch.Tensor


@dataclass(slots=True)
class BatchReuse:
    """``rows``: what runs, by request, ascending, the last token included; None where SGLang's
    own batch runs. ``observer``: sees one layer. ``stage``: passes before or after. ``kept``: of
    the batch's tokens, those that an observer let go on. ``entry``: keeps what enters a layer.
    ``wider``: rows that join in a layer; ``joined``: they have."""

    rows: Sequence["Rows | DeviceRows"] | None = None
    observer: LayerObserver | None = None
    stage: Stage | None = None
    kept: torch.Tensor | None = None
    entry: "Entry | None" = None
    wider: "Wider | None" = None
    joined: bool = False


class BatchedRequest(NamedTuple):
    """A request whose prompt ends in a prefill batch: the ``number``-th of it, its ``chunk`` the
    batch's tokens from ``base`` on."""

    number: int
    base: int
    req: "Req"
    chunk: Range
    state: RequestReuse
    plan: ReusePlan


class Answering(NamedTuple):
    """A request that gets a token from a batch: its ``number`` in it, and how many tokens of it
    have a slot, the newest included."""

    number: int
    length: int
    req: "Req"
    state: RequestReuse


def is_greedy(req: "Req") -> bool:
    """SGLang makes ``top_k`` 1 of a temperature of 0."""
    return bool(req.sampling_params.top_k == 1)


def on_cpu(runner: "ModelRunner") -> bool:
    return str(runner.device) == "cpu"


def to_device(host: torch.Tensor, device: Any) -> torch.Tensor:
    """To the batch's device without waiting for it: only pinned memory is copied asynchronously."""
    return together([host], device)[0]


def together(hosts: Sequence[torch.Tensor], device: Any) -> list[torch.Tensor]:
    """As ``to_device``, several tensors in one copy: what is known at the same time.

    The pinned buffer is the batch's own: torch gives it to no one else before the copy has ended.
    """
    if stays(device):
        return list(hosts)
    starts, at = [], 0
    for host in hosts:
        starts.append(at)
        at += -(-host.nbytes // _ALIGNED) * _ALIGNED
    pinned = _pinned(at)
    for host, start in zip(hosts, starts, strict=True):
        _part_of(pinned, start, host).copy_(host)
    there = pinned.to(device, non_blocking=True)
    return [_part_of(there, start, host) for host, start in zip(hosts, starts, strict=True)]


_ALIGNED = 16  # bytes: what a kernel may take for granted of a tensor of its own


def stays(device: Any) -> bool:
    """Whether what is on the host is on the device already."""
    return torch.device(device).type == "cpu"


def _pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def _part_of(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """Bytes of a buffer as a tensor of that shape and type."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def takes_any_ranges(runner: "ModelRunner") -> bool:
    """Whether partial batches run on our own attention, which has no buffers by range."""
    return bool(runner.attn_backend.kvshare.own)


def pads(runner: "ModelRunner") -> bool:
    """Whether SGLang's own attention pads each request's rows to all of its tokens, as it does with
    torch's on a CPU: there ours costs less wherever it may run."""
    return bool(runner.attn_backend.kvshare.how == "blocks")


def few_enough(rows: Sequence[Rows], runner: "ModelRunner") -> list[Rows]:
    """The rows in no more ranges than the attention backend has room for."""
    if takes_any_ranges(runner):
        return list(rows)
    return merge_ranges(rows, limit=max(runner.max_running_requests, len(rows)))


def few_enough_of(
    rows: Sequence[Rows], numbers: Sequence[int], runner: "ModelRunner"
) -> list[Rows]:
    """As ``few_enough``, but of the requests ``numbers`` alone: the batch has been cut for the
    others, so rows between their ranges are not there any more."""
    out = list(rows)
    if takes_any_ranges(runner):
        return out
    others = sum(one.num_ranges for i, one in enumerate(rows) if i not in numbers)
    limit = max(max(runner.max_running_requests, len(rows)) - others, len(numbers))
    merged = merge_ranges([rows[i] for i in numbers], limit=limit)
    for i, one in zip(numbers, merged, strict=True):
        out[i] = one
    return out


def cut_tokens(
    fb: "ForwardBatch",
    have: Sequence[Rows],
    rows: Sequence[Rows],
    runner: "ModelRunner",
    earlier: Sequence["Part"] = (),
) -> torch.Tensor:
    """Of a batch that runs ``have`` keep only the tokens of ``rows``; requests, and their last
    tokens, stay. ``earlier``: rows that are added to their requests, before all that these have.
    Changes ``fb``. Returns what was kept, as indices into the batch's tokens, those that were
    added behind all others."""
    keep, counts, base = [], [], 0
    added, at = {}, sum(old.num for old in have)
    for part in earlier:
        added[part.number] = torch.arange(at, at + part.rows.num)
        at += part.rows.num
    for i, (old, new) in enumerate(zip(have, rows, strict=True)):
        if i in added:
            keep.append(added[i])
        keep.append(base + torch.from_numpy(new.places_in(old)))
        counts.append(new.num + len(added.get(i, ())))
        base += old.num
    hosts = [torch.cat(keep), torch.tensor(counts, dtype=torch.int32)]
    picked, lengths = together(hosts, fb.input_ids.device)
    keep_tokens(fb, picked, counts, runner, earlier, lengths=lengths)
    return picked


def keep_tokens(
    fb: "ForwardBatch",
    picked: torch.Tensor,
    counts: list[int],
    runner: "ModelRunner",
    earlier: Sequence["Part"] = (),
    *,
    lengths: torch.Tensor | None = None,
) -> None:
    """Of a batch keep the tokens ``picked``, by request ``counts`` of them; ``lengths``: these
    counts on the device, where they are there. Changes ``fb``."""
    device = fb.input_ids.device
    if lengths is None:
        lengths = to_device(torch.tensor(counts, dtype=torch.int32), device)
    for name, more in (
        ("input_ids", [part.ids for part in earlier]),
        ("positions", [on_device(p.rows, device).to(fb.positions.dtype) for p in earlier]),
        ("out_cache_loc", [part.slots for part in earlier]),
    ):
        tokens = getattr(fb, name)
        setattr(fb, name, (torch.cat([tokens, *more]) if more else tokens)[picked])
    if fb.extend_logprob_start_lens_cpu is not None:
        # A request with fewer rows asks for no prompt logprobs; the others keep their start.
        fb.extend_logprob_start_lens_cpu = [
            start if count == length else count
            for start, count, length in zip(
                fb.extend_logprob_start_lens_cpu, counts, fb.extend_seq_lens_cpu, strict=True
            )
        ]
    fb.extend_seq_lens_cpu = counts
    fb.extend_seq_lens = lengths
    fb.extend_start_loc = _starts(lengths)
    fb.extend_num_tokens = len(picked)
    versions.set_num_tokens(fb, len(picked))
    if getattr(runner, "lora_manager", None) is not None:  # 0.5.17 has it with LoRA only
        # Its segments were laid out for all tokens when the batch was built.
        runner.lora_manager.prepare_lora_batch(fb)


_OF_TOKENS = (
    "input_ids", "positions", "out_cache_loc", "extend_seq_lens", "extend_seq_lens_cpu",
    "extend_start_loc", "extend_num_tokens", "extend_logprob_start_lens_cpu",
)  # fmt: skip


def tokens_of(fb: "ForwardBatch") -> dict[str, Any]:
    """What ``keep_tokens`` changes, to be put back."""
    return {name: getattr(fb, name) for name in _OF_TOKENS}


def put_tokens(fb: "ForwardBatch", tokens: dict[str, Any]) -> None:
    for name, value in tokens.items():
        setattr(fb, name, value)
    versions.set_num_tokens(fb, fb.extend_num_tokens)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Where each request's tokens start, in the dtype of ``lengths``."""
    return torch.cumsum(lengths, 0, dtype=lengths.dtype) - lengths


def _as_requests(fb: Any, numbers: list[int], counts: list[int], stops: list[int]) -> Any:
    """A view of the batch as other requests: the i-th runs the ``counts[i]`` rows that end at
    position ``stops[i]``, over the KV of the batch's request ``numbers[i]``."""
    view = copy.copy(fb)
    owner = torch.tensor(numbers)
    starts = [stop - count for stop, count in zip(stops, counts, strict=True)]
    lengths = torch.tensor(stops, dtype=torch.int64)
    hosts = [
        owner,
        lengths.to(fb.seq_lens.dtype),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(counts, dtype=torch.int32),
    ]
    there = together(hosts, fb.input_ids.device)
    picked, view.seq_lens, view.extend_prefix_lens, view.extend_seq_lens = there
    view.batch_size = len(numbers)
    view.req_pool_indices = fb.req_pool_indices[picked]
    if getattr(fb, "req_pool_indices_cpu", None) is not None:
        view.req_pool_indices_cpu = fb.req_pool_indices_cpu[owner]
    view.seq_lens_cpu = lengths
    view.seq_lens_sum = sum(stops)
    view.extend_prefix_lens_cpu = starts
    view.extend_seq_lens_cpu = counts
    view.extend_start_loc = _starts(view.extend_seq_lens)
    return view


def runs_as_rows(fb: "ForwardBatch", rows: Sequence[Rows]) -> Any:
    """A view of the batch in which every contiguous range of rows is a request of its own."""
    flat = [(i, r) for i, one in enumerate(rows) for r in one.ranges]
    return _as_requests(
        fb, [i for i, _ in flat], [r.num for _, r in flat], [r.stop for _, r in flat]
    )


class DeviceRows(NamedTuple):
    """Rows of a request that only the device knows: ``at`` int64 [num], ascending, before ``stop``;
    the host knows how many they are."""

    num: int
    stop: int
    at: torch.Tensor


def on_device(rows: Rows | DeviceRows, device: Any) -> torch.Tensor:
    """Their positions there, int64 [num]."""
    if isinstance(rows, DeviceRows):
        return rows.at
    return to_device(torch.from_numpy(rows.positions), device)


def on_host(rows: Sequence[Rows | DeviceRows]) -> list[Rows]:
    """The rows of a batch of which the host knows all; TypeError otherwise."""
    known = [one for one in rows if isinstance(one, Rows)]
    if len(known) < len(rows):
        raise TypeError("rows that only the device knows can't be cut or attended in ranges")
    return known


class Part(NamedTuple):
    """Some tokens of one request of a batch: the request's ``number`` in it, the ``rows``, and on
    the device their ids and slots [rows.num]."""

    number: int
    rows: Rows | DeviceRows
    ids: torch.Tensor
    slots: torch.Tensor


def part_of_row(
    fb: "ForwardBatch", number: int, rows: Rows, *, tokens: np.ndarray, table: torch.Tensor
) -> Part:
    """``rows`` of the batch's request ``number``: ``tokens`` are its ids, ``table`` its slots."""
    hosts = [torch.from_numpy(tokens[rows.positions]), torch.from_numpy(rows.positions)]
    ids, at = together(hosts, fb.input_ids.device)
    return Part(number, rows, ids.to(fb.input_ids.dtype), table[at].to(fb.out_cache_loc.dtype))


def sub_batch(fb: "ForwardBatch", parts: Sequence[Part], observer: LayerObserver | None) -> Any:
    """A prefill batch of its own that runs just these tokens, in place, over the KV there is."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    counts = [part.rows.num for part in parts]
    at = torch.cat([on_device(part.rows, fb.input_ids.device) for part in parts])
    stops = [part.rows.stop for part in parts]
    view = _as_requests(fb, [part.number for part in parts], counts, stops)
    view.forward_mode = ForwardMode.EXTEND
    view.input_ids = torch.cat([part.ids for part in parts])
    view.out_cache_loc = torch.cat([part.slots for part in parts])
    view.positions = at.to(fb.positions.dtype)
    view.orig_seq_lens = view.seq_lens
    view.extend_num_tokens = sum(counts)
    view.extend_logprob_start_lens_cpu = counts
    view.return_logprob = False
    view.top_logprobs_nums = view.token_ids_logprobs = None
    if fb.rids is not None:
        view.rids = [fb.rids[part.number] for part in parts]
    # Meant for all tokens of the batch, or shared with it and written in place.
    for name in ("replace_embeds", "replace_positions", *_COUNTS):
        if hasattr(view, name):
            setattr(view, name, None)
    versions.set_num_tokens(view, sum(counts))
    view.kvshare = BatchReuse(rows=[part.rows for part in parts], observer=observer)
    return view
