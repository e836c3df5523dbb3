"""Which prompts a conversation sends, turn by turn: edited, under new headers, compacted. Pure.

A turn is a list of parts: text, or the number of an earlier turn, which stands for its answer. So a
history can be sent with answers that are written here, or with those that the server gave.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvshare_sglang.bench.texts import Corpus

DOCUMENT = 2000  # tokens
USER = ANSWER = 60  # tokens of a turn
FRONT = 60  # tokens of the document that an edit replaces

Tokens = list[int]


class Turn(NamedTuple):
    """``counted``: whether the target for single turns holds it. The first turn and those of an
    edit are paid for once."""

    parts: list[Tokens | int]
    counted: bool = True


class History(NamedTuple):
    """A conversation, the answers written for its turns, and the case that says its target."""

    name: str
    case: str
    turns: list[Turn]
    answers: list[Tokens]


class Text:
    """Seeded prose, each token given out once."""

    def __init__(self, tokenizer: object, *, seed: int) -> None:
        self._corpus = Corpus(tokenizer, seed=seed)

    def __call__(self, num: int) -> Tokens:
        # Joined, two pieces may take a token less than apart.
        return self._corpus.encode(self._corpus.take(num + 16))[:num]


def prompt(turn: Turn, answers: Sequence[Tokens]) -> Tokens:
    """The tokens of a turn, given the answers of all turns before it."""
    out: Tokens = []
    for part in turn.parts:
        out += answers[part] if isinstance(part, int) else part
    return out


# ---- the same prompt again -------------------------------------------------------------------


def repeats(text: Text, *, size: int = DOCUMENT, times: int = 4) -> Iterator[History]:
    """A document is cached; then a prompt that holds it moved, edited or cut up, several times."""
    for name in ("moved", "edited", "reordered"):
        document, other = text(size), text(size)
        middle = size // 2
        now = {
            "moved": text(40) + document,
            "edited": document[:middle] + text(8) + document[middle + 8 :],
            "reordered": document[middle:] + other[:middle] + document[:middle],
        }[name] + text(30)
        before = [Turn([document], False), Turn([other], False), Turn([now], False)]
        turns = before + [Turn([now])] * times
        yield History(f"again, {name}", "repeat", turns, [text(ANSWER)] * len(turns))


# ---- conversations over a document -----------------------------------------------------------


def edits(
    text: Text, times: int, *, num_turns: int = 24, size: int = DOCUMENT, user: int = USER
) -> History:
    """The front of the document is replaced ``times`` times, evenly spread over the turns."""
    at = {(i + 1) * num_turns // (times + 1) for i in range(times)}
    document = text(size)
    said: list[Tokens | int] = []
    turns = []
    for i in range(num_turns):
        if i in at:
            document = text(FRONT) + document[FRONT:]
        said = [*said, text(user)]
        turns.append(Turn([document, *said], counted=i > min(at) and i not in at))
        said = [*said, i]
    name = {1: "once", 2: "twice"}.get(times, f"{times} times")
    return History(f"front replaced {name}", "edits", turns, _answers(text, num_turns))


def headers(text: Text, *, num_turns: int = 40, size: int = DOCUMENT, user: int = USER) -> History:
    """Each turn begins with other 20 tokens, as with a clock."""
    document = text(size)
    said: list[Tokens | int] = []
    turns = []
    for i in range(num_turns):
        said = [*said, text(user)]
        turns.append(Turn([text(20), document, *said], counted=i > 0))
        said = [*said, i]
    return History("a clock in front", "header", turns, _answers(text, num_turns))


def side_by_side(
    text: Text, *, num: int = 16, num_turns: int = 10, size: int = DOCUMENT
) -> list[History]:
    """As many conversations with a clock, each over a document of its own."""
    each = [headers(text, num_turns=num_turns, size=size) for _ in range(num)]
    return [h._replace(name=f"{num} at once, a clock each", case="together") for h in each]


def _answers(text: Text, num: int) -> list[Tokens]:
    return [text(ANSWER) for _ in range(num)]


# ---- a coding agent --------------------------------------------------------------------------

COMPACTIONS = ("summarised", "tools reordered", "system changed", "all three")
_TOOLS, _FILES, _KEPT = 14, 5, 2  # _KEPT: turns that a summary leaves as they were


def agents(
    text_of: Callable[[], Text], rng: random.Random, *, num_turns: int = 32, every: int = 8
) -> Iterator[History]:
    """A coding agent under each kind of compaction, every so many turns."""
    for kind in COMPACTIONS:
        yield agent(text_of(), rng, kind, num_turns=num_turns, every=every)


def agent(text: Text, rng: random.Random, kind: str, *, num_turns: int, every: int) -> History:
    """System prompt, tools, files that are read, edited and shown again; then the history is put
    in other words, and the open files are shown once more."""
    whole = kind == "all three"
    system = text(300)
    tools = [text(90) for _ in range(_TOOLS)]
    files = [text(rng.randrange(300, 700)) for _ in range(_FILES)]
    opened: list[int] = []
    said: list[list[Tokens | int]] = []  # by turn
    turns = []
    for i in range(num_turns):
        compacts = i > 0 and i % every == 0
        if compacts and (whole or kind == "tools reordered"):
            tools = rng.sample(tools, len(tools))
        if compacts and (whole or kind == "system changed"):
            system = text(30) + system[30:]
        if compacts and (whole or kind == "summarised"):
            shown = rng.sample(opened, len(opened))
            said = [[text(150), *(files[f] for f in shown)], *said[-_KEPT:]]
        step = text(40)
        if i % 2 == 0:  # a file is read, or edited and shown again
            file = rng.randrange(_FILES)
            if file in opened:
                at = rng.randrange(len(files[file]) - 20)
                files[file] = files[file][:at] + text(12) + files[file][at + 12 :]
            else:
                opened.append(file)
            step = step + files[file]
        said.append([step])
        parts = [part for one in said for part in one]
        turns.append(Turn([system, *tools, *parts], counted=i > every and not compacts))
        said[-1].append(i)
    return History(f"coding agent, {kind}", "compaction", turns, _answers(text, num_turns))


# ---- requests of a file ----------------------------------------------------------------------


def traces(
    name: str, prompts: Sequence[Tokens], text: Text, *, every: int = 6
) -> Iterator[History]:
    """Requests of a file in order, as they are and compacted every so many requests."""
    for kind, sent in ((name, prompts), (f"{name}, compacted", compacted(prompts, text, every))):
        turns = [Turn([one], i > 0) for i, one in enumerate(sent)]
        yield History(kind, "file", turns, [[]] * len(turns))


def compacted(prompts: Sequence[Tokens], text: Text, every: int) -> list[Tokens]:
    """The prompts, their first 30 tokens others and two thirds of what was not yet summarised a
    summary; both stay for as long as prompts go on from what was so changed."""
    front: tuple[Tokens, Tokens] = [], []  # what it was, and what it is
    cuts: list[tuple[int, Tokens, Tokens]] = []  # how far, from the start, and the summary
    sent = []
    for i, ids in enumerate(prompts):
        cuts = [cut for cut in cuts if ids[: cut[0]] == cut[1]]
        if i and i % every == 0 and len(ids) > 400:
            front = ids[:30], text(30)
            start = cuts[-1][0] if cuts else 30
            stop = start + (len(ids) - start) * 2 // 3
            cuts = [*cuts, (stop, ids[:stop], text(60))]
        head = front[1] if front[0] == ids[:30] else ids[:30]
        summaries = [token for _, _, words in cuts for token in words]
        sent.append(head + summaries + ids[cuts[-1][0] if cuts else 30 :])
    return sent
