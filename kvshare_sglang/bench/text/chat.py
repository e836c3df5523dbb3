"""A prompt in the words of a model's chat, and what full prefill says to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang.bench import passages
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.passages import Asked
from kvshare_sglang.bench.quality.outcomes import apart, follow, judge
from kvshare_sglang.plan import ReusePlan
from kvshare_sglang.sim.engine import KV, Lab, Model
from kvshare_sglang.sim.writing import side_by_side

WRITTEN = 24  # tokens of an answer, and of the continuation along which arms are compared


class Texts:
    """A model's tokenizer: the words of a chat to tokens, tokens to text."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        if not self._tokenizer.chat_template:
            raise ScriptError(f"--model {path} has no chat template")
        self.stop: int = self._tokenizer.eos_token_id

    def ids(self, text: str, earlier: Sequence[tuple[str, str]] = ()) -> np.ndarray:
        """Tokens of a prompt in which the user says ``text``, after ``earlier`` turns: what the
        user said and was answered."""
        return self.placed(text, earlier)[0]

    def placed(
        self, text: str, earlier: Sequence[tuple[str, str]] = ()
    ) -> tuple[np.ndarray, str, np.ndarray]:
        """As ``ids``; the prompt itself; and [start, stop) of each token in it."""
        said = [
            {"role": role, "content": words}
            for turn in earlier
            for role, words in zip(("user", "assistant"), turn, strict=True)
        ]
        chat = self._tokenizer.apply_chat_template(
            [*said, {"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        code = self._tokenizer(chat, return_offsets_mapping=True)
        return np.asarray(code["input_ids"], np.int32), chat, np.asarray(code["offset_mapping"])

    def told(self, text: str) -> np.ndarray:
        """Tokens of an answer."""
        return np.asarray(self._tokenizer(text)["input_ids"], np.int32)

    def text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def said(self, ids: list[int], one: Asked) -> dict[str, Any]:
        """What was written, and whether an answer that counts is in it."""
        text = self.text(ids)
        return {"text": text, "right": passages.is_right(text, one.answers)}


class Truth(NamedTuple):
    """Full prefill of a prompt, and two continuations that others are followed along."""

    ids: np.ndarray
    first: torch.Tensor  # logits after the prompt
    kv: KV  # with room for an answer
    answer: list[int]
    told: np.ndarray  # the prompt and full prefill's own answer
    right: np.ndarray  # the prompt and the right answer
    logprobs: torch.Tensor  # [n, vocab], along ``told``

    def measured(self, told: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
        """KL from full prefill along its answer, mean and most of a token; top-1 agreement there,
        of all tokens, of the first, and of those that full prefill gives at least one half; margin
        and negative log-likelihood of the right answer. Both arguments [n, vocab] are
        log-probabilities, along ``told`` and ``right``."""
        far = apart(self.logprobs, told)
        _, margin, nll = judge(right, self.right[len(self.ids) :])
        found = {
            "kl": far.kl, "kl_most": far.kl_most, "top1": far.top1, "margin": margin, "nll": nll,
            "first": float(self.logprobs[0].argmax() == told[0].argmax()),
        }  # fmt: skip
        return found if far.sure is None else found | {"top1_sure": far.sure}


def truth(model: Model, texts: Texts, ids: np.ndarray, one: Asked) -> Truth:
    first, kv = model.full(ids)
    (answer,) = side_by_side(model, [first], [kv], [len(ids)], WRITTEN, stop=texts.stop)
    told = np.concatenate([ids, np.asarray(answer, ids.dtype)])
    right = np.concatenate([ids, texts.told(one.told)])
    wide = model.widened(kv, max(len(ids) + WRITTEN, len(right)), known=len(ids))
    along = follow(model, wide, first, told, len(ids))
    return Truth(ids, first, wide, answer, told, right, along)


def of_full(model: Model, texts: Texts, true: Truth, one: Asked) -> dict[str, Any]:
    """The row of full prefill, which the others are compared with."""
    right = follow(model, true.kv, true.first, true.right, len(true.ids))
    found = true.measured(true.logprobs, right)
    return {**texts.said(true.answer, one), **found, "kl": 0.0, "kl_most": 0.0, "same": True}


def cached(lab: Lab, texts: Texts, one: Asked) -> None:
    """Fill the cache with what was asked before."""
    for prompt in one.cached:
        lab.add(texts.ids(prompt))


def reuse(lab: Lab, ids: np.ndarray) -> ReusePlan:
    """What there is to reuse of a prompt. Raises ScriptError if that is nothing."""
    plan = lab.plan(ids)
    if not plan.copies:
        raise ScriptError(f"nothing is reused of a prompt of {len(ids)} tokens")
    return plan
