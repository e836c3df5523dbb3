"""A chat model with real weights on the real scheduler: texts move, answers stay."""

from pathlib import Path
from typing import Any

import pytest
from lab import computed, lab, request

from kvshare_sglang.bench import smollm2
from kvshare_sglang.bench.demo.story import BAKERY, BOOKSHOP, FERRY, SYSTEM
from kvshare_sglang.runtime import calibration

pytestmark = pytest.mark.weights
MODEL = smollm2.MODELS / smollm2.NAME
NEW = 7


class Chat:
    """Tokens of a conversation that goes on; no two tokenizations disagree on what was said."""

    def __init__(self, documents: tuple[str, ...], question: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
        self.ids = self._encode(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
            + "\n\n".join([*documents, f"Question: {question}"])
            + "<|im_end|>\n<|im_start|>assistant\n"
        )

    def goes_on(self, answer: list[int], question: str) -> list[int]:
        said = f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        self.ids = [*self.ids, *answer, *self._encode(said)]
        return self.ids

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_conversation_over_moved_passages_answers_as_full_prefill_does() -> None:
    """Questions that the model is sure of: others it answers in one way or another anyway."""
    first = Chat((BOOKSHOP, FERRY, BAKERY), "When does the bakery open?")
    chat = Chat((BAKERY, FERRY, BOOKSHOP), "How long does the crossing of the ferry take?")
    flags = {"kvshare_select": "trace", "kvshare_calibration": "auto", "max_total_tokens": 4096}
    with lab(MODEL, kvshare=True, **flags) as it:
        assert Path(it.ask("probes:calibration_of")).parent == calibration.BUILT_IN
        it.one(first.ids, new=1)

        def ask() -> tuple[list[int], dict[str, Any]]:
            exact = request("full", chat.ids, new=NEW, kvshare="exact", extra_key="apart")
            got = it.play([exact, ("idle",), request("mine", chat.ids, new=NEW)])
            full, mine = got["full"], got["mine"]
            assert mine["output"] == full["output"]
            record = mine["kvshare"]
            kinds = ("exact", "blended", "copied", "recomputed", "fresh")
            assert sum(record[f"{kind}_tokens"] for kind in kinds) == len(chat.ids)
            assert record["declined"] is None
            assert computed(record) < 0.4 * len(chat.ids)
            return mine["output"], record

        answer, record = ask()
        assert record["copied_tokens"] > 0.5 * len(chat.ids)
        assert record["recomputed_tokens"] > 0
        chat.goes_on(answer, "Who is the captain of the ferry?")
        _, record = ask()
        assert record["blended_tokens"] > 0.5 * len(chat.ids)  # its own past is a prefix
