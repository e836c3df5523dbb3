"""The same prompts by the real server: full prefill, kvshare with its defaults, and variants."""

from typing import Any

from kvshare_sglang.bench.conversation.rows import counted
from kvshare_sglang.bench.passages import Asked
from kvshare_sglang.bench.server import Answer, Server
from kvshare_sglang.bench.text.chat import WRITTEN, Texts

ARMS: dict[str, Any] = {"ours": "auto", "copies": {"budget": 0.0}} | {
    f"budget {budget}": {"budget": float(budget)} for budget in (".15", ".3", ".5")
}


def answers(server: Server, texts: Texts, one: Asked, arms: list[str]) -> dict[str, Any]:
    """One prompt under full prefill and the arms, each over the same cache. Of a chat the earlier
    turns are asked too, with an arm's own option, and go on with the answers that are written."""
    ids = texts.ids(one.prompt, one.earlier).tolist()
    turns = [
        texts.ids(said, one.earlier[:number]).tolist()
        for number, (said, _) in enumerate(one.earlier)
    ]
    found: dict[str, Any] = {}

    def ask(option: Any) -> tuple[list[int], Answer]:
        got = server.complete(ids, max_new_tokens=WRITTEN, kvshare=option, likeliest=2)
        told = got.output_ids
        return told[: told.index(texts.stop) + 1] if texts.stop in told else told, got

    written = {}
    for name in arms:
        server.flush()
        for prompt in one.cached:
            server.ask(texts.ids(prompt).tolist(), kvshare="exact")
        for turn in turns:
            server.ask(turn, kvshare=ARMS[name])
        written[name], got = ask(ARMS[name])
        rows, settled = counted(got), got.kvshare.get("settled_tokens", 0)
        reused = rows["copied"] + rows["recomputed"]
        found[name] = {
            **texts.said(written[name], one),
            "recomputed": rows["recomputed"] / reused if reused else 0.0,
            # of the rows, once more all those that a token in doubt made run
            "computed": (rows["recomputed"] + rows["fresh"] + settled) / len(ids),
            "doubted": settled > 0,
            "doubt": got.kvshare.get("doubt"),  # where it was this request's own
            "margins": margins(got)[: len(written[name])],
        }
    full, _ = ask("exact")  # the plain branch holds no more of this prompt than without us
    for name in arms:
        found[name]["same"] = written[name] == full
        pairs = enumerate(zip(written[name], full, strict=False))  # one may end before the other
        found[name]["apart_at"] = next((i for i, (a, b) in pairs if a != b), None)
        found[name]["first"] = written[name][0] == full[0]
    said = texts.said(full, one) | {"same": True, "first": True}
    return {"tokens": len(ids), "answers": one.answers, "arms": {"full": said, **found}}


def margins(answer: Answer) -> list[float]:
    """Of each token of a greedy answer, by how many nats it was ahead of the next likeliest."""
    tops = answer.meta["output_top_logprobs"]
    return [round(first[0] - second[0], 4) for first, second in tops]
