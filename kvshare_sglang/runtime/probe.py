"""A pass up to one layer, for the attention that some of its rows pay there to each position."""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from kvshare_sglang.kernels.ops import attention_mass
from kvshare_sglang.runtime.batch import STOP, Entry, LayerView, Part, Stop, StopForward, sub_batch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Asking(NamedTuple):
    """Of a request's rows in the pass those that are asked: their ``places`` among them and their
    ``positions``, int64 on the device. ``length``: of the prompt, in tokens."""

    places: torch.Tensor
    positions: torch.Tensor
    length: int


class Recorded(Protocol):
    """Passes up to one layer that can be replayed."""

    def take(self, parts: Sequence[Part]) -> bool: ...

    def attention_of(
        self, fb: "ForwardBatch", parts: Sequence[Part], asking: Sequence[Asking]
    ) -> list[torch.Tensor]: ...


def attention_of(
    fb: "ForwardBatch",
    parts: Sequence[Part],
    asking: Sequence[Asking],
    forward: Callable[[Any], Any],
    *,
    layer: int,
    recorded: Recorded | None = None,
    entry: Entry | None = None,
    until: int | None = None,
) -> list[torch.Tensor]:
    """Run ``parts`` of the batch up to ``layer``, by a recording where there is one. By part, what
    each position gets there from those that are ``asking``: fp32 [length], on the device.
    ``entry``: keeps what enters the layer. ``until``: a layer behind it, to go on up to; K and V of
    the parts are in the pool there too. Raises what failed."""
    if recorded is not None and entry is None and until is None and recorded.take(parts):
        return recorded.attention_of(fb, parts, asking)
    observer = MassObserver(layer, [part.rows.num for part in parts], asking, until=until)
    with contextlib.suppress(StopForward):
        view = sub_batch(fb, parts, observer)
        view.kvshare.entry = entry
        forward(view)
    return observer.found()


def mass_of(view: LayerView, counts: Sequence[int], asking: Sequence[Asking]) -> list[torch.Tensor]:
    """By request, of which the layer shows ``counts`` rows each, one after the other: what each
    position gets from the rows that are ``asking``, fp32 [length]."""
    found, base = [], 0
    for i, (count, one) in enumerate(zip(counts, asking, strict=True)):
        mass = attention_mass(
            view.q[one.places + base],
            one.positions,
            view.keys(i, one.length),
            scaling=view.scaling,
            strongest_head=True,
        )
        found.append(mass)
        base += count
    return found


class MassObserver:
    """Notes the attention of some rows to each position, and stops the pass there, or in a layer
    behind it."""

    narrows = False

    def __init__(
        self, layer: int, counts: Sequence[int], asking: Sequence[Asking], until: int | None = None
    ) -> None:
        self.layer, self._until = layer, until
        self._counts, self._asking = counts, asking
        self._mass: list[torch.Tensor] = []
        self._failed: Exception | None = None

    def observe(self, view: LayerView) -> Stop | None:
        if self._mass:
            return STOP
        try:
            self._mass = mass_of(view, self._counts, self._asking)
        except Exception as error:
            self._failed = error
            return STOP
        if self._until is None or self._until <= self.layer:
            return STOP
        self.layer = self._until
        return None

    def found(self) -> list[torch.Tensor]:
        if self._failed is not None:
            raise self._failed
        return self._mass
