"""A prompt in the words of a model's chat, and what full prefill says to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rapidfuzz.distance import LCSseq

from kvshare_sglang.bench import passages
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.passages import Asked
from kvshare_sglang.bench.quality.outcomes import apart, follow, judge
from kvshare_sglang.plan import ReusePlan
from kvshare_sglang.sim.engine import KV, Lab, Model
from kvshare_sglang.sim.writing import side_by_side

WRITTEN = 24  # tokens of an answer, and of the continuation along which arms are compared
SAME = {"same": True, "rouge_l": 1.0}


def alike(written: list[int], true: list[int]) -> dict[str, Any]:
    """Whether two answers are the same, and ROUGE-L: F1 of their longest common subsequence of
    tokens (Lin 2004)."""
    common = LCSseq.similarity(written, true)
    return {"same": written == true, "rouge_l": 2 * common / (len(written) + len(true))}


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

    def said(self, ids: list[int], one: Asked | None) -> dict[str, Any]:
        """What was written, whether an answer that counts is in it, if there is one, and F1."""
        text = self.text(ids)
        if one is None:
            return {"text": text}
        right, f1 = passages.is_right(text, one.answers), passages.f1(text, one.answers)
        return {"text": text, "right": right, "f1": f1}


class Truth(NamedTuple):
    """Full prefill of a prompt, and the continuations that others are followed along."""

    ids: np.ndarray
    first: torch.Tensor  # logits after the prompt
    kv: KV  # with room for an answer
    answer: list[int]
    told: np.ndarray  # the prompt and full prefill's own answer
    right: np.ndarray | None  # the prompt and the right answer, if there is one
    logprobs: torch.Tensor  # [n, vocab], along ``told``
    written: int  # tokens of an answer, at most

    @property
    def paths(self) -> list[np.ndarray]:
        """``told``, and ``right`` if there is one."""
        return [self.told] if self.right is None else [self.told, self.right]

    def measured(self, told: torch.Tensor, right: torch.Tensor | None = None) -> dict[str, float]:
        """KL from full prefill along its answer, mean and most of a token; top-1 agreement there,
        of all tokens, of the first, and of those that full prefill gives at least one half; margin
        and negative log-likelihood of the right answer. Both arguments [n, vocab] are
        log-probabilities, along ``paths``."""
        far = apart(self.logprobs, told)
        found = {
            "kl": far.kl, "kl_most": far.kl_most, "top1": far.top1,
            "first": float(self.logprobs[0].argmax() == told[0].argmax()),
        }  # fmt: skip
        if right is not None:
            assert self.right is not None
            _, found["margin"], found["nll"] = judge(right, self.right[len(self.ids) :])
        return found if far.sure is None else found | {"top1_sure": far.sure}


def truth(
    model: Model, texts: Texts, ids: np.ndarray, one: Asked | None, *, written: int = WRITTEN
) -> Truth:
    """``written``: tokens of the answer at most."""
    first, kv = model.full(ids)
    (answer,) = side_by_side(model, [first], [kv], [len(ids)], written, stop=texts.stop)
    told = np.concatenate([ids, np.asarray(answer, ids.dtype)])
    right = np.concatenate([ids, texts.told(one.told)]) if one else told
    wide = model.widened(kv, max(len(ids) + written, len(right)), known=len(ids))
    along = follow(model, wide, first, told, len(ids))
    return Truth(ids, first, wide, answer, told, right if one else None, along, written)


def of_full(model: Model, texts: Texts, true: Truth, one: Asked | None) -> dict[str, Any]:
    """The row of full prefill, which the others are compared with."""
    paths = [follow(model, true.kv, true.first, path, len(true.ids)) for path in true.paths[1:]]
    found = true.measured(true.logprobs, *paths)
    return {**texts.said(true.answer, one), **found, "kl": 0.0, "kl_most": 0.0, **SAME}


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
