"""A chat model with real weights is asked about documents that move, change, and are another's.

The same conversations go to a plain server and to one with kvshare, through the door that chat
programs use. What a stranger can judge: both answers, side by side, and what each of them took.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvshare_sglang.bench import common, passages
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.server import Server
from kvshare_sglang.bench.text import prompts

NEW_TOKENS = 24
SYSTEM = "Answer the question from the documents in one short sentence."

# Paragraphs of XQuAD (Artetxe et al. 2020, English; CC BY-SA 4.0) by how they begin, and what is
# edited in them. Written by no one here, and short enough for a small model.
BEGIN = ("Peyton Manning", "The agreements include", "In 1891 Scottish", "With a budget of")
AGE, BUDGET = ("at age 39", "at age 42"), ("$230,000", "$480,000")
SOURCE = "XQuAD, CC BY-SA 4.0 (benchmarks/passages)"


class Act(NamedTuple):
    """A question over some documents. ``tenant``: whose they are."""

    title: str
    documents: tuple[str, ...]
    question: str
    tenant: str = "a"


def documents() -> list[str]:
    """The paragraphs of the story, in the order of ``BEGIN``."""
    texts = [passage.text for passage in passages.load(prompts.SAMPLE)]
    return [next(text for text in texts if text.startswith(begin)) for begin in BEGIN]


def acts() -> list[Act]:
    """The first fills the caches; each of the others finds what those before it left."""
    first = documents()
    manning, fees, oxygen, tapes = first
    moved = (tapes, oxygen, fees, manning)
    edited = (manning.replace(*AGE), fees, oxygen, tapes)
    age = "How old was Peyton Manning when he played in Super Bowl 50?"
    fee = "What were the annual carriage fees for the channels?"
    budget = "What budget did the restoration of the Apollo 11 tapes have?"
    return [
        Act("first asked", tuple(first), age),
        Act("the documents moved", moved, fee),
        Act("a fact was edited", edited, age),
        Act("moved, edited, one is gone", (fees, tapes.replace(*BUDGET), oxygen), budget),
        Act("another tenant asks", moved, fee, tenant="b"),
    ]


class Told(NamedTuple):
    """One server's answer. ``ttft_s`` and ``cpu_s``: wall and processor time to the first token."""

    text: str
    ttft_s: float
    cpu_s: float
    prompt_tokens: int
    kvshare: dict[str, Any] | None


class Scene(NamedTuple):
    """An act, and what both servers said."""

    act: Act
    plain: Told
    ours: Told

    @property
    def ratio(self) -> float:
        return self.plain.ttft_s / self.ours.ttft_s

    @property
    def cpu_ratio(self) -> float:
        return self.plain.cpu_s / max(self.ours.cpu_s, 1e-3)

    def to_json(self) -> dict[str, Any]:
        told = {"plain": self.plain._asdict(), "kvshare": self.ours._asdict()}
        return {"title": self.act.title, "question": self.act.question, **told}


def play(plain: Server, shared: Server) -> list[Scene]:
    """All acts, each server first in half of them."""
    scenes, every = [], acts()
    with common.Progress(len(every)) as bar:
        for server in (plain, shared):
            server.flush()
        for i, act in enumerate(every):
            bar.say(act.title)
            order = (plain, shared) if i % 2 == 0 else (shared, plain)
            told = {server.spec.name: ask(server, act) for server in order}
            scenes.append(Scene(act, told["plain"], told["kvshare"]))
            bar.update()
        bar.say("told")
    return scenes


def ask(server: Server, act: Act) -> Told:
    """Stream a greedy answer of the chat door. Raises ScriptError where it fails."""
    documents = "\n\n".join(f"Document: {one}" for one in act.documents)
    body = {
        "model": "any",
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{documents}\n\nQuestion: {act.question}"},
        ],
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": act.tenant,
    }
    text, ttft, cpu = "", None, 0.0
    usage: dict[str, Any] = {}
    before, started = server.cpu_s(), time.perf_counter()
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ScriptError(f"{server.spec.name} answered {response.read().decode()[:500]}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                piece = choice["delta"].get("content") or ""
                if piece and ttft is None:
                    ttft = time.perf_counter() - started
                    cpu = server.cpu_s() - before
                text += piece
    if ttft is None:
        raise ScriptError(f"'{server.spec.name}' sent no token. Log:\n{server.log_tail()}")
    record = (usage.get("kvshare") or [None])[0]
    return Told(text.strip(), ttft, cpu, usage["prompt_tokens"], record)


def show(scenes: Sequence[Scene]) -> str:
    """What a reader of the terminal sees."""
    lines = []
    for i, scene in enumerate(scenes, start=1):
        act, plain, ours = scene.act, scene.plain, scene.ours
        lines.append(f"{i}. {act.title}: {act.question}")
        lines.append(f"   plain    {plain.ttft_s:6.2f} s   {one_line(plain.text)}")
        same = "   (the same)" if ours.text == plain.text else ""
        lines.append(f"   kvshare  {ours.ttft_s:6.2f} s   {one_line(ours.text)}{same}")
        lines.append(f"   {what_became(scene)}")
    return "\n".join(lines)


def what_became(scene: Scene) -> str:
    record = scene.ours.kvshare
    if record is None:
        raise ScriptError("the server said nothing of kvshare in the usage: is it running?")
    computed = record["recomputed_tokens"] + record["fresh_tokens"]
    kept = record["exact_tokens"] + record["blended_tokens"]
    return (
        f"of {scene.ours.prompt_tokens} tokens {kept} were an exact or blended prefix,"
        f" {record['copied_tokens']} copied, {computed} computed;"
        f" {scene.ratio:.1f}x as fast to the first token ({scene.cpu_ratio:.1f}x in CPU time)"
    )


def missed(scenes: Sequence[Scene]) -> list[str]:
    """The acts that should have copied and did not, by title, and why."""
    return [
        f"{scene.act.title} ({record.get('declined') or 'nothing was found'})"
        for scene in scenes[1:-1]
        if not (record := scene.ours.kvshare or {}).get("copied_tokens")
    ]


def one_line(text: str) -> str:
    return " ".join(text.split())


def draw(scenes: Sequence[Scene], path: Path, *, subtitle: str) -> None:
    """Times to the first token, and what became of the prompts."""
    from kvshare_sglang.bench.demo.picture import draw_pairs

    rows = []
    for scene in scenes:
        record = scene.ours.kvshare
        assert record is not None  # ``show`` says so of a server without
        shares = {
            "prefix": record["exact_tokens"] + record["blended_tokens"],
            "copied": record["copied_tokens"],
            "recomputed": record["recomputed_tokens"],
            "new": record["fresh_tokens"],
        }
        total = sum(shares.values())
        rows.append((
            scene.act.title, scene.plain.ttft_s, scene.ours.ttft_s,
            {part: count / total for part, count in shares.items()},
        ))  # fmt: skip
    ratios = [(scene.ratio, scene.cpu_ratio) for scene in scenes]
    draw_pairs(rows, path, subtitle=subtitle, ratios=ratios)
