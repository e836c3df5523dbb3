"""Tasks whose answers depend on text far back, and the pairs of prompts that share that text. Pure.

Random numbers in, text out. A scene is a list of documents, a document a list of facts, and
``read`` is the one place that says what they mean. No answer can be told without the facts.

    lookup   "The code of the tower is 48."
    hops     "Ana keeps 48 coins. Ben keeps as many coins as Ana."
    few      "otter -> dax. pear -> wug." asks for another animal, or another fruit
    state    a header says who the captain is, which unit holds, what a sign means
    text     prose of Python's own documentation, to be continued
"""

from kvshare_sglang.bench.tasks.draws import Size
from kvshare_sglang.bench.tasks.edits import EditKind, Pair, Where, edit
from kvshare_sglang.bench.tasks.facts import (
    HEADERS,
    HINTS,
    PHRASES,
    TOPICS,
    Ask,
    Document,
    Fact,
    Known,
    Topic,
    consistent,
    read,
)
from kvshare_sglang.bench.tasks.lessons import Piece, closed_words, lesson
from kvshare_sglang.bench.tasks.pairs import adversarial, listing, splice, template
from kvshare_sglang.bench.tasks.python_docs import prose, sentences
from kvshare_sglang.bench.tasks.samples import TASKS, Sample, listing_prompt, make, scene, text

__all__ = [
    "HEADERS",
    "HINTS",
    "PHRASES",
    "TASKS",
    "TOPICS",
    "Ask",
    "Document",
    "EditKind",
    "Fact",
    "Known",
    "Pair",
    "Piece",
    "Sample",
    "Size",
    "Topic",
    "Where",
    "adversarial",
    "closed_words",
    "consistent",
    "edit",
    "lesson",
    "listing",
    "listing_prompt",
    "make",
    "prose",
    "read",
    "scene",
    "sentences",
    "splice",
    "template",
    "text",
]
