"""Which tokens of a prompt with codes are what: the sentence asked about, its rivals, and more."""

import re
from collections.abc import Callable

import numpy as np

from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.passages import Asked
from kvshare_sglang.bench.text.chat import Texts

FACT = re.compile(r"The access code of (.+?) is (\d+)\.")
HEAD = 16  # rows at the start of a passage


class Places:
    """Tokens of a prompt; boolean arrays over them. ``fact`` is the sentence that answers the
    question, ``digits`` its code, ``facts`` all sentences with codes, ``passage`` that of the fact,
    ``before`` what is before the fact, ``heads`` the first rows of each passage."""

    def __init__(self, texts: Texts, one: Asked) -> None:
        ids, chat, spans = texts.placed(one.prompt)
        self.ids, self._spans = ids, spans
        asks = one.prompt.rpartition("access code of ")[2].rstrip("?")
        facts = list(FACT.finditer(chat))
        (mine,) = (f for f in facts if f[1] == asks)
        self.facts = np.any([self._within(*f.span()) for f in facts], axis=0)
        self.fact = self._within(*mine.span())
        self.digits = self._within(*mine.span(2))
        bounds = [m.end() for m in re.finditer("\n\n", chat)]
        start = max(b for b in bounds if b <= mine.start())
        stop = min(b for b in bounds if b > mine.start())
        self.passage = self._within(start, stop)
        at = np.arange(len(ids))
        self.before = at < int(np.flatnonzero(self.fact)[0])
        heads = [np.searchsorted(spans[:, 0], b) for b in bounds]
        self.heads = np.any([(at >= h) & (at < h + HEAD) for h in heads], axis=0)

    def _within(self, start: int, stop: int) -> np.ndarray:
        return (self._spans[:, 1] > start) & (self._spans[:, 0] < stop)


PARTS: dict[str, Callable[[Places], np.ndarray]] = {
    "nothing": lambda p: np.zeros(len(p.ids), bool),
    "its digits": lambda p: p.digits,
    "its sentence": lambda p: p.fact,
    "all sentences": lambda p: p.facts,
    "other sentences": lambda p: p.facts & ~p.fact,
    "its passage": lambda p: p.passage,
    "other passages": lambda p: ~p.passage,
    "all but its sentence": lambda p: ~p.fact,
    "all but sentences": lambda p: ~p.facts,
    "before it": lambda p: p.before,
    "after it": lambda p: ~p.before & ~p.fact,
    "heads of passages": lambda p: p.heads,
}
# Of a part: K and V put right, one of them, or its rows computed again over the other copies.
SIDES = {"": (True, True), "K": (True, False), "V": (False, True), "run": (False, False)}


def part_and_side(name: str) -> tuple[str, str]:
    """``its sentence | K`` as the names of a part and of a side. Raises ScriptError on others."""
    part, _, side = name.partition(" | ")
    if part not in PARTS:
        raise ScriptError(f"--part must be one of {', '.join(PARTS)}, got {part!r}")
    if side not in SIDES:
        known = ", ".join(filter(None, SIDES))
        raise ScriptError(f"after | in --part must be one of {known}, got {side!r}")
    return part, side
