"""Several questions about one set of documents, asked turn by turn; later ones rest on rows that
earlier turns left open.

The documents of the first turn were cached in other company, or before an edit. Its question can
do without what changed, where there is one that can; the last question always rests on it. The
history holds the true answers, so all servers see the same prompts.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench import common, tasks
from kvshare_sglang.bench.conversation.rows import counted
from kvshare_sglang.bench.quality.cases import MOST_OF_ANSWER, TRIES, Encoder, drawn, pair_of
from kvshare_sglang.bench.server import Server

TASKS = ("hops", "state")  # what depends on text far from what is asked
CASES = ("splice", "edit far", "template", "adversarial")
TURNS = (2, 5)
ARMS: dict[str, Any] = {"ours": {}, "copies": {"budget": 0.0}}  # besides stock: full prefill


class Dialogue(NamedTuple):
    """What was cached, the prompts of all turns, and their answers."""

    cached: list[np.ndarray]
    prompts: list[np.ndarray]
    answers: list[np.ndarray]


def dialogues(
    encode: Encoder, task: str, case: str, turns: int, *, size: tasks.Size, max_len: int,
    new_text: int = 0,
) -> Iterator[Dialogue]:  # fmt: skip
    """Without end, always the same ones. ``new_text``: tokens of prose, about, in front of each
    question but the first. Raises NoPrompt where none is found in ``TRIES`` tries."""
    rng = random.Random(f"test turns {task} {case} {turns}")
    filler = tasks.sentences("test")

    def draw() -> Dialogue | None:
        pair = pair_of(rng, task, case, size, filler)
        asks = questions(rng, pair, turns) if pair else None
        if pair is None or asks is None:
            return None
        said = [_prose(rng, encode, filler, new_text if turn else 0) for turn in range(turns)]
        made = _dialogue(encode, pair, asks, said)
        longest = max(len(ids) for ids in (*made.cached, made.prompts[-1]))
        return None if longest + MOST_OF_ANSWER > max_len else made

    missing = (
        f"{task}, {case}: none of {TRIES} samples of {size.facts} facts has {turns}"
        f" questions that fit into {max_len} tokens"
    )
    return drawn(draw, missing=missing)


def questions(
    rng: random.Random, pair: tasks.Pair, turns: int
) -> list[tuple[tuple[str, str], str]] | None:
    """What is asked in each turn, and the answers; None where there are too few questions.

    A question is *open* if its answer follows from other facts and differs in what was cached. In
    a splice nothing that was cached tells another answer: there all that follow are open."""
    known = tasks.read(pair.prompt.documents)
    before = tasks.read(pair.cached[0].documents)
    asks = [
        ask
        for ask, found in known.items()
        if tasks.TOPICS[ask[0]].task in TASKS and found.depth > 0
    ]
    rng.shuffle(asks)
    spliced = pair.case == "splice"
    changed = [ask for ask in asks if spliced or _answer(before, ask) != known[ask].answer]
    if not changed or len(asks) < turns:
        return None
    last = changed.pop()
    settled = [ask for ask in asks if ask not in changed and ask != last]
    first = settled.pop() if settled else changed.pop()
    between = [*changed, *settled][: turns - 2]
    rng.shuffle(between)
    return [(ask, known[ask].answer) for ask in (first, *between, last)]


def _answer(known: dict[tuple[str, str], tasks.Known], ask: tuple[str, str]) -> str | None:
    return known[ask].answer if ask in known else None


def _prose(rng: random.Random, encode: Encoder, filler: Sequence[str], tokens: int) -> str:
    """Lines of filler, of so many tokens or a few more."""
    text = ""
    while len(encode(text)) < tokens:
        text += f"\n{rng.choice(filler)}"
    return text


def _dialogue(
    encode: Encoder, pair: tasks.Pair, asks: list[tuple[tuple[str, str], str]], said: list[str]
) -> Dialogue:
    """``said``: what stands in front of each question."""
    ids = encode("\n".join(map(str, pair.prompt.documents)), start=True)
    prompts, answers = [], []
    for ((topic, key), answer), before in zip(asks, said, strict=True):
        ids = np.concatenate([ids, encode(f"{before}\nQ: {tasks.Ask(topic, (key,))} A:")])
        prompts.append(ids)
        answers.append(encode(f" {answer}."))
        ids = np.concatenate([ids, answers[-1]])
    cached = [encode(one.prompt, start=True) for one in pair.cached]
    return Dialogue(cached, prompts, answers)


def line(stock: Server, ours: Server, one: Dialogue) -> dict[str, Any]:
    """A dialogue in all arms."""
    arms = {"full": _played(stock, one, None)}
    arms |= {name: _played(ours, one, option) for name, option in ARMS.items()}
    return {"tokens": [len(ids) for ids in one.prompts], "arms": arms}


def _played(server: Server, one: Dialogue, option: Any) -> list[dict[str, Any]]:
    """What each turn gave; ``option``: kvshare's of each request, None in stock SGLang."""
    server.flush()
    stock = option is None
    for ids in one.cached:
        server.ask(ids.tolist(), kvshare=None if stock else "exact")
    out = []
    for ids, answer in zip(one.prompts, one.answers, strict=True):
        got = server.ask(ids.tolist(), max_new_tokens=len(answer), kvshare=option)
        out.append(
            {
                "right": got.output_ids == answer.tolist(),
                "exact": got.meta["cached_tokens"],
                **({} if stock else counted(got)),
            }
        )
    return out


def summary(lines: list[dict[str, Any]], **cell: Any) -> list[dict[str, Any]]:
    """A row for each arm and turn. Intervals are those of pairs with full prefill."""
    rows = []
    num_turns = len(lines[0]["tokens"]) if lines else 0
    for arm in ("full", *ARMS):
        for turn in range(num_turns):
            mine = [line["arms"][arm][turn] for line in lines]
            right = np.array([one["right"] for one in mine], float)
            full = np.array([line["arms"]["full"][turn]["right"] for line in lines], float)
            computed = [
                one["recomputed"] + one["fresh"] if "fresh" in one else tokens - one["exact"]
                for one, tokens in zip(mine, (line["tokens"][turn] for line in lines), strict=True)
            ]
            again = sum(one.get("recomputed", 0) for one in mine)
            reused = again + sum(one.get("copied", 0) + one.get("blended", 0) for one in mine)
            rows.append(
                {
                    **cell,
                    "turns": num_turns,
                    "turn": turn + 1,
                    "arm": arm,
                    "n": len(lines),
                    "right": float(right.mean()),
                    "minus_full": float((right - full).mean()),
                    "ci95": common.bootstrap_ci95(list(right - full), statistic=np.mean),
                    "lost": int(((full == 1) & (right == 0)).sum()),
                    "won": int(((full == 0) & (right == 1)).sum()),
                    "rows": float(np.mean(computed)),
                    "recomputed": again / reused if reused else 0.0,
                }
            )
    return rows


COLUMNS = {
    "cell": "{task} {case}",
    "turn": "{turn} of {turns}",
    "arm": "{arm}",
    "n": "{n}",
    "right": "{right:.3f}",
    "minus_full": "{minus_full:+.3f}",
    "ci95": "{ci95[0]:+.3f} {ci95[1]:+.3f}",
    "lost": "{lost}",
    "won": "{won}",
    "rows": "{rows:.0f}",
    "recomputed": "{recomputed:.1%}",
}

BY_CELL = {
    "cell": "{task} {case}",
    "n": "{n}",
    "full_prefill": "{full}",
    "kvshare": "{ours}",
    "copies_alone": "{copies}",
    "kvshare_lost/won": "{flips}",
}


def by_cell(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same in a line for each task and case: right answers and flips, turn after turn."""
    rows = []
    for task, case, turns in dict.fromkeys((r["task"], r["case"], r["turns"]) for r in found):
        mine = [r for r in found if (r["task"], r["case"], r["turns"]) == (task, case, turns)]
        arms = {
            arm: sorted((r for r in mine if r["arm"] == arm), key=lambda r: int(r["turn"]))
            for arm in ("full", *ARMS)
        }
        right = {arm: " / ".join(f"{r['right']:.3f}" for r in each) for arm, each in arms.items()}
        flips = " ".join(f"{r['lost']}/{r['won']}" for r in arms["ours"])
        rows.append({"task": task, "case": case, "n": mine[0]["n"], **right, "flips": flips})
    return rows
