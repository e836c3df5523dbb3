"""Tasks whose answers depend on text far back, and the pairs of prompts that share that text.

Pure: random numbers in, text out. A scene is a list of documents, a document a list of facts, and
``read`` is the one place that says what they mean: facts are read in order, a later header
replaces an earlier one, a chain takes the value that holds at that point. So whatever is edited,
the answer follows from the facts, and no answer can be told without them.

    lookup   "The code of the tower is 48."
    hops     "Ana keeps 48 coins. Ben keeps as many coins as Ana."
    few      "otter -> dax. pear -> wug." asks for another animal, or another fruit
    state    a header says who the captain is, which unit holds, what a sign means
    text     prose of Python's own documentation, to be continued
"""

import ast
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

Where = Literal["near", "far", "any"]
EditKind = Literal["substitution", "insertion", "deletion"]

TASKS = ("lookup", "hops", "few", "state")

# ---- words: closed sets, each word one token -------------------------------------------------

PEOPLE = (
    "Ana Ben Cara Dan Eve Finn Gus Hana Ivan Jo Kim Leo Mia Ned Ola Pam Quin Ros Sam Tia Uma Vic "
    "Wes Xan Yara Zed Abe Bea Cy Dot Eli Fay Gil Ida Jon Kay Lou Max Nia Oz"
).split()
THINGS = (
    "tower garden harbor bridge castle forest island market museum station temple valley village "
    "window library kitchen engine ladder mirror river mill farm barn cabin cave chapel church "
    "cinema clinic college court dam depot dock factory field fort fountain gallery garage gate "
    "hall hangar hotel inn lake lab lodge manor mine office orchard palace park pier plant plaza "
    "pond port prison quarry ranch road school shed shop stable store street studio tavern tent "
    "theater tomb track tunnel vault villa wall warehouse well wharf yard zoo"
).split()
ROLES = "captain doctor pilot judge baker singer".split()
SIGNS = "star moon cross arrow circle square wave crown flame leaf".split()
MEANINGS = "closed open empty full danger safe hot cold wet dry sold free".split()
UNITS = "pounds kilos tons grams stones ounces".split()
LABELS = "dax wug fep blick toma zup kiv lorp mip nool pim rell sarn tiv vash yop".split()
CATEGORIES = {
    "animal": "otter lion horse goat sheep wolf bear mouse rabbit tiger".split(),
    "fruit": "pear apple grape lemon cherry peach plum mango melon fig".split(),
    "tool": "hammer saw drill axe wrench pliers shovel rake chisel knife".split(),
    "cloth": "shirt coat scarf glove hat sock shoe belt dress skirt".split(),
    "color": "red blue green yellow purple orange brown pink gray black".split(),
    "music": "piano violin flute drum guitar harp cello trumpet horn banjo".split(),
    "body": "arm leg nose ear knee elbow foot hand neck chin".split(),
    "vehicle": "truck car bus train boat ship bike plane sled wagon".split(),
}
CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words}
NUMBERS = [str(n) for n in range(10, 100)]
TITLES = "Report Letter Note Memo Story Record".split()

# ---- facts -----------------------------------------------------------------------------------

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
    """All that the documents tell, by topic and key. What hangs on nothing is left out."""
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


@dataclass(frozen=True)
class Sample:
    """A prompt, as data: the documents, the question and its answer."""

    task: str
    documents: tuple[Document, ...]
    ask: Ask
    depth: int = 0
    continuation: str = ""  # what follows a text that is to be continued

    @property
    def question(self) -> str:
        return str(self.ask)

    @property
    def answer(self) -> str | None:
        """The answer, or None where the documents do not tell it."""
        if self.task == "text":
            return self.continuation
        known = read(self.documents)
        found = [known.get((self.ask.topic, key)) for key in self.ask.keys]
        parts = [k.answer for k in found if k is not None]
        if len(parts) < len(found):
            return None
        if len(parts) == 1:
            return parts[0]
        return ", ".join(f"{k} {a}" for k, a in zip(self.ask.keys, parts, strict=True))

    @property
    def prompt(self) -> str:
        """The text up to the answer, which starts with a space and ends with a full stop."""
        lines = [str(document) for document in self.documents]
        if self.task == "text":
            return "\n".join(lines)
        return "\n".join([*lines, f"Q: {self.question} A:"])


class Pair(NamedTuple):
    """Prompts that were served before, and the one to answer now."""

    case: str
    cached: tuple[Sample, ...]
    prompt: Sample
    kind: str = ""
    where: str = ""

    @property
    def changes(self) -> bool:
        """Whether the answer differs from the one that the first cached prompt had."""
        return self.cached[0].answer != self.prompt.answer


# ---- scenes ----------------------------------------------------------------------------------


class Size(NamedTuple):
    """How long and how varied a scene is."""

    facts: int  # sentences in all
    documents: int = 3
    depth: int = 3  # of the longest chain
    phrases: int = 3  # phrasings that may be used
    shared: float = 0.2  # how often two kinds of fact speak of the same thing
    prose: float = 0.06  # sentences of filler, for each fact
    hints: float = 0.0  # how often what follows from a fact is spelled out; for training only
    rivals: float = 0.0  # how often all headers are of one kind; for training only


class _Words:
    """Draws words of a scene; things may come back for another kind of fact."""

    def __init__(self, rng: random.Random, size: Size) -> None:
        self._rng, self._size = rng, size
        self._things = rng.sample(THINGS, len(THINGS))
        self._told: dict[str, list[str]] = {}  # things by the kind of fact
        self.people = rng.sample(PEOPLE, len(PEOPLE))
        self.numbers = rng.sample(NUMBERS, len(NUMBERS))

    def things(self, kind: str, count: int) -> list[str]:
        """Things of which no such fact was told yet; some are known from facts of other kinds."""
        told = self._told.setdefault(kind, [])
        used = [t for things in self._told.values() for t in things if t not in told]
        old = [t for t in dict.fromkeys(used) if self._rng.random() < self._size.shared]
        old = self._rng.sample(old, min(len(old), count // 2))
        fresh = [self._things.pop() for _ in range(min(count - len(old), len(self._things)))]
        picked = old + fresh
        told += picked
        self._rng.shuffle(picked)
        return picked

    def number(self) -> str:
        if not self.numbers:
            self.numbers = self._rng.sample(NUMBERS, len(NUMBERS))
        return self.numbers.pop()

    def fact(self, kind: str, key: str, value: str) -> Fact:
        phrases = min(self._size.phrases, len(PHRASES[kind]))
        return Fact(kind, key, value, self._rng.randrange(phrases))


def scene(
    rng: random.Random, shares: dict[str, int], size: Size, prose: Sequence[str] = ()
) -> tuple[Document, ...]:
    """Documents with so many facts of each task, mixed, in an order in which they make sense."""
    words = _Words(rng, size)
    makers: dict[str, Callable[..., list[list[Fact]]]] = {
        "lookup": _lookup, "hops": _hops, "few": _few, "state": _state
    }  # fmt: skip
    parts = [makers[task](rng, words, count, size) for task, count in shares.items() if count]
    if prose:
        filler = [Fact("prose", "", s) for s in prose if rng.random() < size.prose * size.facts]
        parts.append(_scatter(rng, filler, size.documents))
    documents = [_merge(rng, [part[i] for part in parts]) for i in range(size.documents)]
    return tuple(Document(rng.choice(TITLES), tuple(facts)) for facts in documents if facts)


def _lookup(rng: random.Random, words: _Words, count: int, size: Size) -> list[list[Fact]]:
    facts: list[Fact] = []
    codes = count if size.phrases == 1 or rng.random() < 0.5 else rng.randint(count // 2, count)
    for kind, n in (("code", codes), ("price", count - codes)):
        facts += [words.fact(kind, thing, words.number()) for thing in words.things(kind, n)]
    rng.shuffle(facts)
    return _scatter(rng, facts, size.documents)


def _hops(rng: random.Random, words: _Words, count: int, size: Size) -> list[list[Fact]]:
    """Chains of people, in any order in which each hangs on one who was named before."""
    count = min(count, len(words.people))
    facts: list[Fact] = []
    depth: dict[str, int] = {}
    value: dict[str, str] = {}
    for i in range(count):
        who = words.people[i]
        open_ends = [p for p in depth if depth[p] < size.depth]
        if open_ends and rng.random() < 0.6:
            deepest = max(depth[p] for p in open_ends)
            deep = [p for p in open_ends if depth[p] == deepest]
            other = rng.choice(deep if rng.random() < 0.4 else open_ends)
            depth[who], value[who] = depth[other] + 1, value[other]
            facts.append(words.fact("same", who, other))
            if rng.random() < size.hints:
                facts.append(Fact("so coins", who, value[who]))
        else:
            depth[who], value[who] = 0, words.number()
            facts.append(words.fact("keeps", who, value[who]))
    return _scatter(rng, facts, size.documents, ordered=True)


def _few(rng: random.Random, words: _Words, count: int, size: Size) -> list[list[Fact]]:
    """Demonstrations of a mapping from categories to labels, in one phrasing."""
    names = rng.sample(sorted(CATEGORIES), min(len(CATEGORIES), max(2, (count + 1) // 2)))
    labels = dict(zip(names, rng.sample(LABELS, len(names)), strict=True))
    picked = [rng.choice(CATEGORIES[name]) for name in names[:count]]
    rest = [w for name in names for w in CATEGORIES[name] if w not in picked]
    picked += rng.sample(rest, min(len(rest), count - len(picked)))
    rng.shuffle(picked)
    phrase = rng.randrange(min(size.phrases, len(PHRASES["demo"])))
    facts = [Fact("demo", word, labels[CATEGORY_OF[word]], phrase) for word in picked]
    return _scatter(rng, facts, size.documents)


def _state(rng: random.Random, words: _Words, count: int, size: Size) -> list[list[Fact]]:
    """In each document a header and what hangs on it; a header may change half-way."""
    out: list[list[Fact]] = [[] for _ in range(size.documents)]
    used = rng.sample(range(size.documents), min(size.documents, max(1, count // 4)))
    people = rng.sample(PEOPLE, len(PEOPLE))
    legend: dict[str, str] = {}
    # In most scenes few headers of one kind compete, and it does to look for any of them.
    rivals = bool(size.rivals) and rng.random() < size.rivals
    only = rng.choice(("role", "unit")) if rivals else None
    roles = rng.sample(ROLES, 3) if rivals else ROLES
    for i, at in enumerate(sorted(used)):
        room = count // len(used) + (i < count % len(used))
        kind = only or rng.choice(("role", "unit", "means"))
        holds: dict[str, str] = {}  # by role, or by sign; the unit stands alone
        if kind == "means":
            holds = legend  # for all that follows
            new = [s for s in rng.sample(SIGNS, 1 + (not legend)) if s not in legend]
        else:
            new = rng.sample(roles, min(3, 1 + room // 4)) if kind == "role" else [""]

        def header(name: str, kind: str = kind, holds: dict[str, str] = holds) -> Fact:
            pool = {"role": people, "unit": UNITS, "means": MEANINGS}[kind]
            holds[name] = rng.choice([v for v in pool if v not in holds.values()])
            return words.fact(kind, name, holds[name])

        out[at] += [header(name) for name in new]
        things = words.things(kind, max(1, room - len(new)))
        turn = rng.randrange(1, len(things)) if len(things) > 3 and rng.random() < 0.3 else None
        for j, thing in enumerate(things):
            if j == turn and kind != "means":
                out[at].append(header(rng.choice(new)))
            name = rng.choice(sorted(holds))
            if kind == "unit":
                number = words.number()
                out[at].append(words.fact("weighs", thing, number))
                if size.hints and rng.random() < size.hints:
                    out[at].append(Fact("so weight", thing, f"{number} {holds['']}"))
                continue
            out[at].append(words.fact("guards" if kind == "role" else "bears", thing, name))
            if rng.random() < size.hints:
                told = "so guard" if kind == "role" else "so sign"
                out[at].append(Fact(told, thing, holds[name]))
    return out


def _scatter(
    rng: random.Random, facts: list[Fact], count: int, *, ordered: bool = False
) -> list[list[Fact]]:
    places = [rng.randrange(count) for _ in facts]
    if ordered:
        places.sort()
    out: list[list[Fact]] = [[] for _ in range(count)]
    for fact, place in zip(facts, places, strict=True):
        out[place].append(fact)
    return out


def _merge(rng: random.Random, lists: list[list[Fact]]) -> list[Fact]:
    """One list with all of them, each in its own order."""
    turns = [i for i, facts in enumerate(lists) for _ in facts]
    rng.shuffle(turns)
    left = [iter(facts) for facts in lists]
    return [next(left[i]) for i in turns]


# ---- prose -----------------------------------------------------------------------------------


@cache
def prose(split: Literal["train", "test"]) -> tuple[str, ...]:
    """Paragraphs of the documentation in Python's standard library; test modules are held out."""
    return tuple(text for name, text in _paragraphs() if (_held_out(name)) == (split == "test"))


def sentences(split: Literal["train", "test"]) -> tuple[str, ...]:
    """Single sentences of that prose, as filler between facts."""
    parts = (s for text in prose(split) for s in re.split(r"(?<=[.])\s+", text))
    return tuple(s for s in parts if re.fullmatch(r"[A-Z][a-z]+ [A-Za-z ,'-]{20,80}\.", s))


def _held_out(name: str) -> bool:
    return sum(name.encode()) % 10 == 0


def _paragraphs() -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for name, doc in _docs():
        for part in re.split(r"\n\s*\n", doc):
            text = re.sub(r"\s+", " ", part).strip()
            letters = sum(c.isalpha() or c in " ,." for c in text)
            if 120 <= len(text) <= 1200 and letters > 0.95 * len(text) and text not in seen:
                seen.add(text)
                yield name, text


def _docs() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    yield from sorted(topics.items())
    root = Path(os.__file__).parent
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        if "site-packages" in path.parts or "test" in str(path.relative_to(root)):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield path.stem, ast.get_docstring(node) or ""


# ---- samples and pairs -----------------------------------------------------------------------


def make(
    task: str, rng: random.Random, size: Size, *, keys: int = 1, depth: int | None = None,
    filler: Sequence[str] = (),
) -> Sample:  # fmt: skip
    """A sample of a task among facts of the others, asking about ``keys`` keys.

    ``depth`` wants a chain of just that many hops. The scene is drawn anew until it has one.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    for _ in range(200):
        documents = scene(rng, _shares(task, rng, size), size, _pick(rng, filler))
        asks = [
            (topic, key)
            for (topic, key), found in read(documents).items()
            if TOPICS[topic].task == task and depth in (None, found.depth)
        ]
        shown = {f.key for d in documents for f in d.facts if f.kind == "demo"}
        asks = [a for a in asks if a[0] != "label" or a[1] not in shown]
        if not asks:
            continue
        topic = rng.choice(asks)[0]
        of_topic = [key for t, key in asks if t == topic]
        if len(of_topic) < keys:
            continue
        ask = Ask(topic, tuple(rng.sample(of_topic, keys)))
        known = read(documents)
        return Sample(task, documents, ask, max(known[topic, k].depth for k in ask.keys))
    raise ValueError(f"no {task} with {keys} keys and depth {depth} in scenes of {size}")


def _shares(task: str, rng: random.Random, size: Size) -> dict[str, int]:
    main = max(3, round(size.facts * rng.uniform(0.45, 0.7)))
    others = rng.sample([t for t in TASKS if t != task], 2)
    left = max(0, size.facts - main)
    return {task: main, others[0]: left - left // 2, others[1]: left // 2}


def _pick(rng: random.Random, filler: Sequence[str]) -> list[str]:
    return [rng.choice(filler)] if filler else []


def text(rng: random.Random, *, split: Literal["train", "test"], paragraphs: int = 3) -> Sample:
    """Prose in documents, the last of them cut in two: a beginning, and how it went on."""
    picked = rng.sample(prose(split), paragraphs)
    words = picked[-1].split(" ")
    cut = len(words) // 3
    picked[-1] = " ".join(words[:cut])
    documents = tuple(Document("Text", (Fact("prose", "", p),)) for p in picked)
    return Sample("text", documents, Ask("", ()), continuation=" ".join(words[cut:]))


def edit(
    rng: random.Random, sample: Sample, kind: EditKind, *, changes: bool, where: Where = "any"
) -> Pair | None:
    """The sample, and a prompt from before it was edited in one fact.

    ``far`` edits lie in the first third of the facts, ``near`` ones behind the middle, with a
    fifth of the facts after them. None if this sample has no such edit: a deletion changes an
    answer only where a header falls away.
    """
    places = [(d, i) for d, doc in enumerate(sample.documents) for i in range(len(doc.facts))]
    num = len(places)
    if where != "any":
        part = (0, max(1, num // 3)) if where == "far" else (num * 11 // 20, max(1, num * 4 // 5))
        places = places[slice(*part)]
    rng.shuffle(places)
    for d, i in places:
        for before in _before(rng, sample.documents[d].facts, i, kind):
            documents = list(sample.documents)
            documents[d] = documents[d]._replace(facts=before)
            cached = replace(sample, documents=tuple(documents))
            told_apart = kind == "insertion" or cached.answer is not None
            if (
                before
                and (cached.answer != sample.answer) == changes
                and told_apart
                and consistent(cached.documents)
            ):
                return Pair("edit", (cached,), sample, kind, where)
    return None


def _before(
    rng: random.Random, facts: tuple[Fact, ...], i: int, kind: EditKind
) -> Iterator[tuple[Fact, ...]]:
    """What a document may have said before an edit at fact ``i`` made it what it is."""
    fact = facts[i]
    if kind == "insertion":
        if fact.kind != "prose" and fact.kind not in HINTS:
            yield facts[:i] + facts[i + 1 :]
    elif kind == "substitution":
        for value in _other_values(rng, fact):
            yield (*facts[:i], fact._replace(value=value), *facts[i + 1 :])
    else:
        headers = [f for f in facts[: i + 1] if f.kind in ("role", "unit")]
        for other in [*headers[-1:], *rng.sample(facts, min(3, len(facts)))]:
            for extra in _one_more(rng, other):
                yield (*facts[: i + 1], extra, *facts[i + 1 :])


def _pool(kind: str) -> list[str]:
    pools = {
        "code": NUMBERS, "price": NUMBERS, "keeps": NUMBERS, "weighs": NUMBERS, "same": PEOPLE,
        "demo": LABELS, "role": PEOPLE, "guards": ROLES, "unit": UNITS, "means": MEANINGS,
        "bears": SIGNS,
    }  # fmt: skip
    return pools.get(kind, [])


def _other_values(rng: random.Random, fact: Fact) -> list[str]:
    pool = [v for v in _pool(fact.kind) if v != fact.value]
    return rng.sample(pool, len(pool))


def _one_more(rng: random.Random, like: Fact) -> list[Fact]:
    """Facts that might have stood beside this one: a header told anew, or one on another key."""
    if like.kind in ("role", "unit"):
        return [like._replace(value=v) for v in _other_values(rng, like)[:4]]
    keys = {"keeps": PEOPLE, "same": PEOPLE}.get(like.kind, THINGS)
    if like.kind in ("prose", "means") or like.kind in HINTS:
        return []
    if like.kind == "demo":
        keys = CATEGORIES[CATEGORY_OF[like.key]]
    value = like.value if like.kind == "demo" else rng.choice(_pool(like.kind))
    return [like._replace(key=k, value=value) for k in rng.sample(keys, 4) if k != like.key]


def splice(rng: random.Random, sample: Sample, *, foreign: Sequence[Document]) -> Pair:
    """The sample, and prompts that held its documents in another order, others between them."""
    own = list(sample.documents)
    rng.shuffle(own)
    half = (len(own) + 1) // 2
    cached = []
    for part in (own[:half], own[half:]):
        if part:
            others = rng.sample(list(foreign), min(len(foreign), 2))
            mixed = [*others[:1], *part, *others[1:]]
            cached.append(replace(sample, documents=tuple(mixed)))
    return Pair("splice", tuple(cached), sample)


def template(rng: random.Random, sample: Sample, *, slots: int = 6) -> Pair:
    """The sample, and the same frame with other values in some slots. The answer changes with
    them wherever it can."""
    places = [
        (d, i)
        for d, doc in enumerate(sample.documents)
        for i, fact in enumerate(doc.facts)
        if fact.kind in _SLOTS
    ]
    best = None
    for _ in range(200):
        documents = [list(d.facts) for d in sample.documents]
        for d, i in rng.sample(places, min(slots, len(places))):
            fact = documents[d][i]
            documents[d][i] = rng.choice([fact._replace(value=v) for v in _other_values(rng, fact)])
        before = tuple(
            doc._replace(facts=tuple(facts))
            for doc, facts in zip(sample.documents, documents, strict=True)
        )
        if not consistent(before):
            continue
        cached = replace(sample, documents=before)
        best = best or cached
        if cached.answer not in (None, sample.answer):
            return Pair("template", (cached,), sample)
    if best is None:
        raise ValueError("no other values found that are consistent")
    return Pair("template", (best,), sample)


def adversarial(rng: random.Random, sample: Sample) -> Pair | None:
    """The sample, and a prompt whose first half was rewritten so that the second half, word for
    word the sample's, meant something else: the answer differs. None if it can't be made to."""
    half = len(sample.documents) // 2
    for _ in range(50):
        attack = tuple(
            doc._replace(
                facts=tuple(
                    fact._replace(value=rng.choice(_other_values(rng, fact)))
                    if fact.kind in _SLOTS
                    else fact
                    for fact in doc.facts
                )
            )
            for doc in sample.documents[:half]
        )
        cached = replace(sample, documents=attack + sample.documents[half:])
        own = replace(sample, documents=sample.documents[half:])
        steered = cached.answer not in (None, sample.answer)
        if steered and own.answer != sample.answer and consistent(cached.documents):
            return Pair("adversarial", (cached,), sample)
    return None


def listing(
    rng: random.Random, task: str, size: Size, *, keys: int, filler: Sequence[str] = ()
) -> tuple[Pair, list[tuple[str, str]]]:
    """A template pair whose question names no key, and the list that answers it: what stands
    before each value, and the value. Which rows matter shows only as the keys are written."""
    sample = make(task, rng, size, keys=keys, filler=filler)
    pair = template(rng, sample, slots=10)
    known = read(sample.documents)
    parts = [
        (f" {key}" if i == 0 else f", {key}", f" {known[sample.ask.topic, key].answer}")
        for i, key in enumerate(sample.ask.keys)
    ]
    return pair, parts


def listing_prompt(sample: Sample) -> str:
    """The sample's prompt, its question without the keys."""
    lines = [str(document) for document in sample.documents]
    return "\n".join([*lines, f"Q: {TOPICS[sample.ask.topic].listing}? A:"])


_SLOTS = frozenset({"code", "price", "keeps", "weighs", "role", "unit", "means"})


# ---- training --------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Text, and what it is to a loss: an ``answer`` to be learned, or the rest."""

    text: str
    task: str = ""  # of an answer
    depth: int = 0


def lesson(
    rng: random.Random, shares: dict[str, int], size: Size, filler: Sequence[str] = ()
) -> Iterator[Piece]:
    """A scene and then questions without end: many answers for each token of the documents.

    Most lines ask for a list of keys, or give such a list without naming it first.
    """
    documents = scene(rng, shares, size, _pick(rng, filler))
    known = read(documents)
    for i, document in enumerate(documents):
        yield Piece(f"{document.title}:" if i == 0 else f"\n{document.title}:")
        for fact in document.facts:
            if fact.kind in HINTS:
                topic = fact.kind.removeprefix("so ")
                head, tail = str(fact).rsplit(f" {fact.value}", 1)
                yield Piece(f" {head}")
                yield Piece(f" {fact.value}", TOPICS[topic].task, known[topic, fact.key].depth)
                yield Piece(tail)
            else:
                yield Piece(f" {fact}")
    shown = {f.key for d in documents for f in d.facts if f.kind == "demo"}
    by_topic: dict[str, list[str]] = {}
    for topic, key in known:
        if topic != "label" or key not in shown or rng.random() < 0.2:
            by_topic.setdefault(topic, []).append(key)
    if not by_topic:
        return
    while True:
        # topics with more keys are asked more often
        topic = rng.choice([t for t, keys in by_topic.items() for _ in keys[:12]])
        keys = by_topic[topic]
        count = 1 if rng.random() < 0.35 else rng.randint(1, 8)
        yield from _asked(rng, topic, rng.sample(keys, min(count, len(keys))), known)


def _asked(
    rng: random.Random, topic: str, keys: list[str], known: dict[tuple[str, str], Known]
) -> Iterator[Piece]:
    task = TOPICS[topic].task
    if len(keys) == 1:
        found = known[topic, keys[0]]
        yield Piece(f"\nQ: {Ask(topic, tuple(keys))} A:")
        yield Piece(f" {found.answer}", task, found.depth)
        yield Piece(".")
        return
    named = rng.random() < 0.4
    yield Piece(f"\nQ: {Ask(topic, tuple(keys)) if named else TOPICS[topic].listing + '?'} A:")
    for i, key in enumerate(keys):
        found = known[topic, key]
        yield Piece(f" {key}" if i == 0 else f", {key}")
        yield Piece(f" {found.answer}", task, found.depth)
    yield Piece(".")


def closed_words() -> list[str]:
    """Every word and mark that the tasks are made of, with the space before it where it has one."""
    words = [*PEOPLE, *THINGS, *ROLES, *SIGNS, *MEANINGS, *UNITS, *LABELS, *NUMBERS, *CATEGORY_OF]
    lines = [p for phrases in PHRASES.values() for p in phrases]
    lines += [t.question for t in TOPICS.values()]
    lines += [f"{t.listing} of?" for t in TOPICS.values()]
    frame = re.findall(r"[A-Za-z]+|->", re.sub(r"\{\w+\}", "", " ".join(lines)))
    spaced = [f" {w}" for w in dict.fromkeys([*words, *frame, "A", "Q"])]
    return [*spaced, *TITLES, "Text", "Q"]
