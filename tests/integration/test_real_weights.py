"""A chat model with real weights on the real scheduler: texts move, answers stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab import computed, lab, request

from kvshare_sglang.bench import smollm2
from kvshare_sglang.bench.demo.story import SYSTEM
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.base import SINK
from kvshare_sglang.runtime import calibration
from kvshare_sglang.sim.engine import Lab, Model

pytestmark = pytest.mark.weights
MODEL = smollm2.MODELS / smollm2.NAME
NEW = 7

BOOKSHOP = (
    "The Harbour Bookshop stands on the corner of Mill Street and the old fish market. It was"
    " opened in 1952 by Ada Lindqvist, who had been a ship's cook for eleven years. Books may be"
    " returned within 30 days of purchase if the spine is not broken and the receipt is shown at"
    " the desk. Gift cards and newspapers cannot be returned. Members of the reading club get a"
    " discount of ten percent on Tuesdays, and children get a free bookmark with each book."
)
FERRY = (
    "The ferry Marigold sails from the town pier to Gull Island four times a day in summer and"
    " twice a day in winter. The crossing takes 35 minutes. A ticket costs 6 euros, and bicycles"
    " travel for 2 euros more. Dogs are welcome on the upper deck. In storms the ferry stays in"
    " the harbour, and tickets are valid on the next day. The captain is Ingrid Solberg, whose"
    " grandfather built the first pier of the island."
)
BAKERY = (
    "Pellegrini's bakery opens at six in the morning, an hour before any other shop in town. It"
    " is known for its rye bread, which is baked in a wood oven of 1911, and for almond cakes"
    " that are made on Fridays only. Bread of the day before is sold at half its price. The"
    " baker, Luca Pellegrini, delivers to the school, the hospital and the two hotels with a"
    " yellow van. On the first Monday of each month the bakery is closed."
)


class Chat:
    """Tokens of a conversation that goes on; no two tokenizations disagree on what was said."""

    def __init__(self, documents: tuple[str, ...], question: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
        self.ids = self.encode(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
            + "\n\n".join([*documents, f"Question: {question}"])
            + "<|im_end|>\n<|im_start|>assistant\n"
        )

    def goes_on(self, answer: list[int], question: str) -> list[int]:
        said = f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        self.ids = [*self.ids, *answer, *self.encode(said)]
        return self.ids

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_conversation_over_moved_passages_answers_as_full_prefill_does() -> None:
    """Questions that the model is sure of: others it answers in one way or another anyway."""
    first = Chat((BOOKSHOP, FERRY, BAKERY), "When does the bakery open?")
    chat = Chat((BAKERY, FERRY, BOOKSHOP), "How long does the crossing of the ferry take?")
    flags = {"kvshare_select": "trace", "kvshare_calibration": "auto", "max_total_tokens": 4096}
    with lab(MODEL, kvshare=True, **flags) as it:
        assert Path(it.ask("probes:calibration_of")).parent == calibration.BUILT_IN
        it.one(first.ids, new=1)

        def ask(doubt: float, new: int = NEW) -> tuple[list[int], dict[str, Any]]:
            exact = request("full", chat.ids, new=new, kvshare="exact", extra_key="apart")
            mine = request("mine", chat.ids, new=new, kvshare={"doubt": doubt})
            got = it.play([exact, ("idle",), mine])
            full, mine = got["full"], got["mine"]
            assert mine["output"] == full["output"]
            record = mine["kvshare"]
            kinds = ("exact", "blended", "copied", "recomputed", "fresh")
            assert sum(record[f"{kind}_tokens"] for kind in kinds) == len(chat.ids)
            assert record["declined"] is None
            assert computed(record) < 0.4 * len(chat.ids)
            return mine["output"], record

        answer, record = ask(doubt=0)
        assert record["copied_tokens"] > 0.5 * len(chat.ids)
        assert record["recomputed_tokens"] > 0
        chat.goes_on(answer, "Who is the captain of the ferry?")
        answer, record = ask(doubt=0)
        assert record["blended_tokens"] > 0.5 * len(chat.ids)  # its own past is a prefix
        # As the calibration has it, of a long answer some token is in doubt; it is full prefill's.
        chat.goes_on(answer, "Tell me about the ferry in your own words.")
        _, record = ask(doubt=it.ask("probes:doubt_of"), new=32)
        assert record["blended_tokens"] > 0.5 * len(chat.ids)
        assert record["settled_tokens"] > 0.5 * len(chat.ids)


@pytest.mark.parametrize("selector", ["copy", "window"])
def test_a_prompt_that_begins_with_moved_text_has_a_sink(selector: str) -> None:
    """As a completion without a chat may, where the tokenizer adds no first token. If its first row
    is a copy from the middle of another prompt all rows are off: a KL of .86, with the sink .05."""
    before = Chat((BOOKSHOP, FERRY, BAKERY), "When does the bakery open?")
    text = f"{BAKERY}\n\n{FERRY}\n\n{BOOKSHOP}\n\nThe crossing of the ferry takes"
    ids = np.array(before.encode(text), np.int32)
    model = Model(MODEL)
    with_runs = Lab(model, KVShareConfig())
    with_runs.add(np.array(before.ids, np.int32))
    plan = with_runs.plan(ids)
    assert plan.runs[0].dst_start <= SINK
    done = with_runs.prefill(ids, plan, selector, budget=0.0)
    full, mine = (x.log_softmax(-1) for x in (model.full(ids)[0], done.logits))
    kl = float((full.exp() * (full - mine)).sum())
    assert kl < 0.1
