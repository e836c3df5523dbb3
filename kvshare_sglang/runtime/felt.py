"""How far the end of a prompt moves as the chosen rows are computed again: before and after, in one
layer. On a CPU.

The last rows see all that was copied. The first pass of a trace runs them over copies as they are,
the batch over those repaired; what still is not repaired moves them on, by about as much. So where
little moved them, little is wrong with the margins of what comes next (``doubt.py``).
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from kvshare_sglang.kernels.row_scores import deviation
from kvshare_sglang.policy.select.attention_trace import probe_layer
from kvshare_sglang.runtime.batch import Part

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

# In the lower half a question in front of all text can't be told from a harmless edit: SmolLM2's
# last rows are moved by .03 and .03 there, by .12 and .02 here; margins by .8 and .07 nats.
AT = 0.75
LAST = 8  # rows


class Felt(NamedTuple):
    """V of the last rows of a prompt in ``layer``, as it was: [rows, heads, dim]; and their
    ``slots``, which hold what it is now."""

    layer: int
    slots: torch.Tensor
    values: torch.Tensor


def layer_of(layers: int, probe: int) -> int:
    """Where it is felt in so many layers: not before the probe layer, up to which passes run
    anyway."""
    return max(probe, probe_layer(layers, AT))


def before(part: Part, runner: "ModelRunner", layer: int) -> Felt:
    """``part``: what a pass up to ``layer`` ran of a request, the end of its prompt last."""
    slots = part.slots[-LAST:]
    return Felt(layer, slots, _values(runner, layer)[slots].clone())


def shift(felt: Felt, runner: "ModelRunner") -> float:
    """By what share of their length those rows' V has moved since, root mean square over rows."""
    return shift_of(_values(runner, felt.layer)[felt.slots], felt.values)


def shift_of(now: torch.Tensor, then: torch.Tensor) -> float:
    """
    >>> shift_of(torch.tensor([[[4.0, 0.0]]]), torch.tensor([[[4.0, 1.0]]]))
    0.25
    """
    return float(deviation(now, then).square().mean().sqrt())


def _values(runner: "ModelRunner", layer: int) -> torch.Tensor:
    found: torch.Tensor = runner.token_to_kv_pool.get_value_buffer(layer)
    return found
