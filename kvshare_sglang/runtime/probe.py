"""A pass up to one layer, for the attention that some of its rows pay there to each position."""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvshare_sglang.kernels.ops import attention_mass
from kvshare_sglang.runtime.batch import STOP, LayerView, Part, Stop, StopForward, sub_batch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Asking(NamedTuple):
    """Of a request's rows in the pass those that are asked: their ``places`` among them and their
    ``positions``, int64 on the device. ``length``: of the prompt, in tokens."""

    places: torch.Tensor
    positions: torch.Tensor
    length: int


def attention_of(
    fb: "ForwardBatch",
    parts: Sequence[Part],
    asking: Sequence[Asking],
    forward: Callable[[Any], Any],
    *,
    layer: int,
) -> list[torch.Tensor]:
    """Run ``parts`` of the batch up to ``layer``. By part, what each position gets there from those
    that are ``asking``: fp32 [length], on the device. Raises what failed."""
    observer = MassObserver(layer, [part.rows.num for part in parts], asking)
    with contextlib.suppress(StopForward):
        forward(sub_batch(fb, parts, observer))
    return observer.found()


class MassObserver:
    """Notes the attention of some rows to each position, and stops the pass."""

    narrows = False

    def __init__(self, layer: int, counts: Sequence[int], asking: Sequence[Asking]) -> None:
        self.layer = layer
        self._counts, self._asking = counts, asking
        self._mass: list[torch.Tensor] = []
        self._failed: Exception | None = None

    def observe(self, view: LayerView) -> Stop:
        try:
            base = 0
            for i, (count, one) in enumerate(zip(self._counts, self._asking, strict=True)):
                self._mass.append(
                    attention_mass(
                        view.q[one.places + base],
                        one.positions,
                        view.keys(i, one.length),
                        scaling=view.scaling,
                        strongest_head=True,
                    )
                )
                base += count
        except Exception as error:
            self._failed = error
        return STOP

    def found(self) -> list[torch.Tensor]:
        if self._failed is not None:
            raise self._failed
        return self._mass
