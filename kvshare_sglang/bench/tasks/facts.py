"""What a fact says, and what a list of documents means: ``read`` alone decides. Pure.

Facts are read in order, a later header replaces an earlier one, a chain takes the value that holds
at that point. So whatever is edited, the answer follows from the facts.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvshare_sglang.bench.tasks.words import CATEGORIES, CATEGORY_OF

# What a fact of each kind says; the later phrasings come in as training goes on.
PHRASES: dict[str, tuple[str, ...]] = {
    "code": (
        "The code of the {key} is {value}.",
        "The {key} has code {value}.",
        "To open the {key}, use {value}.",
    ),
    "price": (
        "The price of the {key} is {value}.",
        "The {key} has price {value}.",
        "To buy the {key}, pay {value}.",
    ),
    "keeps": (
        "{key} keeps {value} coins.",
        "{key} has {value} coins.",
        "{key} holds {value} coins.",
    ),
    "same": (
        "{key} keeps as many coins as {value}.",
        "{key} has the same coins as {value}.",
        "{key} holds what {value} holds.",
    ),
    "so coins": ("So {key} keeps {value} coins.",),
    "so guard": ("So the guard of the {key} is {value}.",),
    "so sign": ("So the {key} says {value}.",),
    "so weight": ("So the {key} weighs {value}.",),
    "demo": ("{key} -> {value}.", "{key} is a {value}.", "{key} counts as {value}."),
    "role": ("The {key} is {value}.", "The {key} is called {value}.", "Our {key} is {value}."),
    "guards": ("The {value} guards the {key}.", "The {value} owns the {key}."),
    "unit": ("Weights are in {value}.", "All weights are given in {value}."),
    "weighs": ("The {key} weighs {value}.", "The weight of the {key} is {value}."),
    "means": ("A {key} means {value}.", "The {key} stands for {value}."),
    "bears": ("The {key} bears the {value}.", "On the {key} is a {value}."),
    "prose": ("{value}",),
}
HEADERS = frozenset({"role", "unit", "means"})
# what was told already, put plainly
HINTS = frozenset({"so coins", "so guard", "so sign", "so weight"})


class Fact(NamedTuple):
    """One sentence of a document."""

    kind: str
    key: str
    value: str
    phrase: int = 0

    def __str__(self) -> str:
        return PHRASES[self.kind][self.phrase].format(key=self.key, value=self.value)


class Document(NamedTuple):
    """A passage with a title."""

    title: str
    facts: tuple[Fact, ...]

    def __str__(self) -> str:
        return f"{self.title}: " + " ".join(map(str, self.facts))


class Known(NamedTuple):
    """What is known of a key once all is read, and by how many steps it came about."""

    answer: str
    depth: int


class Topic(NamedTuple):
    """A kind of question: its task, the question about one key, and the head of a list of keys."""

    task: str
    question: str
    listing: str


TOPICS: dict[str, Topic] = {
    "code": Topic("lookup", "What is the code of the {key}?", "Codes"),
    "price": Topic("lookup", "What is the price of the {key}?", "Prices"),
    "coins": Topic("hops", "How many coins does {key} keep?", "Coins"),
    "label": Topic("few", "What is the label of {key}?", "Labels"),
    "guard": Topic("state", "Who guards the {key}?", "Guards"),
    "weight": Topic("state", "How much does the {key} weigh?", "Weights"),
    "sign": Topic("state", "What does the {key} say?", "Signs"),
}


class Ask(NamedTuple):
    """A question about some keys; with one key it is asked in a sentence, else as a list."""

    topic: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        topic = TOPICS[self.topic]
        if len(self.keys) == 1:
            return topic.question.format(key=self.keys[0])
        return f"{topic.listing} of {', '.join(self.keys)}?"


def read(documents: Sequence[Document]) -> dict[tuple[str, str], Known]:
    """All that the documents tell, by topic and key. What depends on nothing told is left out."""
    known: dict[tuple[str, str], Known] = {}
    headers: dict[tuple[str, str], str] = {}
    for document in documents:
        for kind, key, value, _ in document.facts:
            if kind in HEADERS:
                headers[kind, key] = value
            elif kind in ("code", "price"):
                known[kind, key] = Known(value, 0)
            elif kind == "keeps":
                known["coins", key] = Known(value, 0)
            elif kind == "same":
                if (other := known.get(("coins", value))) is not None:
                    known["coins", key] = Known(other.answer, other.depth + 1)
                else:
                    known.pop(("coins", key), None)
            elif kind == "demo":
                for word in CATEGORIES[CATEGORY_OF[key]]:
                    known["label", word] = Known(value, 0)
            elif kind == "guards" and ("role", value) in headers:
                known["guard", key] = Known(headers["role", value], 1)
            elif kind == "weighs" and ("unit", "") in headers:
                known["weight", key] = Known(f"{value} {headers['unit', '']}", 1)
            elif kind == "bears" and ("means", value) in headers:
                known["sign", key] = Known(headers["means", value], 1)
    return known


def consistent(documents: Sequence[Document]) -> bool:
    """Whether nothing but a header is told twice, and labels go by category alone."""
    told: set[tuple[str, str]] = set()
    labels: dict[str, str] = {}
    for document in documents:
        for kind, key, value, _ in document.facts:
            if kind == "demo" and labels.setdefault(CATEGORY_OF[key], value) != value:
                return False
            if kind in HEADERS or kind in HINTS or kind == "prose":
                continue
            slot = ("coins" if kind in ("keeps", "same") else kind, key)
            if slot in told:
                return False
            told.add(slot)
    return len(set(labels.values())) == len(labels)
