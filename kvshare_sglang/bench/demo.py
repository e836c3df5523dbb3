"""Show a real SGLang server with and without kvshare, side by side, on texts that moved.

Starts two servers on the same model, one plain and one with ``--kvshare``, gives both the same
texts to cache, and asks both the same prompts: the same text behind another preface, a document
with three edits, RAG passages in another order, and unrelated text.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import _models
from _answers import ask_reader, show_answers
from _server import Answer, ScriptError, Server, ServerSpec, default_device, run_main, serve
from _text import Corpus

NEW_TOKENS = 16
BLUE, ORANGE, LIGHT, GREY = "#3b6ea5", "#e07b39", "#f2c49b", "#c9ced6"


class Case(NamedTuple):
    """Prompts that were served before, and the prompt that is timed."""

    cached: list[str]
    prompt: str


class Timing(NamedTuple):
    """One prompt on both servers."""

    prompt_tokens: int
    plain_s: float
    kvshare_s: float
    tokens: dict[str, int]
    agreement: float  # of the reusing answer with the plain server's, leading tokens
    exact_agreement: float | None  # of the answer in exact mode, where it was asked
    declined: str | None


@dataclass
class Scenario:
    """A kind of request, how to make one, and what was measured."""

    title: str
    make: Callable[[Corpus, int], Case]
    timings: list[Timing] = field(default_factory=list)

    def mean(self, get: Callable[[Timing], float]) -> float:
        return sum(map(get, self.timings)) / len(self.timings)

    def share(self, kind: str) -> float:
        return self.mean(lambda t: t.tokens[kind] / t.prompt_tokens)

    @property
    def plain_s(self) -> float:
        return _bench.median([t.plain_s for t in self.timings])

    @property
    def kvshare_s(self) -> float:
        return _bench.median([t.kvshare_s for t in self.timings])

    @property
    def ratio(self) -> float:
        """Of the pairs, so that what slows the machine for a while slows both sides."""
        return _bench.median([t.plain_s / t.kvshare_s for t in self.timings])

    @property
    def exact_agreement(self) -> float:
        asked = [t.exact_agreement for t in self.timings if t.exact_agreement is not None]
        return sum(asked) / len(asked)


# ---- the scenarios ---------------------------------------------------------------------------


def moved(corpus: Corpus, size: int) -> Case:
    document = corpus.take(size)
    old = f"You are a careful assistant. {corpus.take(40)}\n\nRead this:\n\n"
    new = f"Today's notes: {corpus.take(90)}\n\nHere is a text.\n\n"
    return Case([old + document + "\n\nWhat is it about?"], new + document + "\n\nSum it up.")


def edited(corpus: Corpus, size: int) -> Case:
    words = corpus.take(size).split(" ")
    changed = list(words)
    first, second, third = (int(len(words) * part) for part in (0.03, 0.4, 0.75))
    del changed[third : third + 8]
    changed[second:second] = corpus.take(12).split(" ")
    changed[first : first + 2] = ["quite", "something", "else"]
    ask = "\n\nReview this document."
    return Case([" ".join(words) + ask], " ".join(changed) + ask)


def shuffled(corpus: Corpus, size: int) -> Case:
    passages = [corpus.take(size // 10) for _ in range(10)]
    order = (7, 2, 9, 4, 0, 6, 3, 8, 1, 5)

    def ask(picked: list[str], question: str) -> str:
        return "\n\n".join([f"{corpus.take(16)}", *picked, question])

    before = [ask(passages[:5], "Which is longest?"), ask(passages[5:], "Which is shortest?")]
    return Case(before, ask([passages[i] for i in order], "Answer with the passages above."))


def unrelated(corpus: Corpus, size: int) -> Case:
    return Case([corpus.take(size)], corpus.take(size))


def scenarios() -> list[Scenario]:
    return [
        Scenario("same text, other preface", moved),
        Scenario("document with 3 edits", edited),
        Scenario("RAG passages, other order", shuffled),
        Scenario("unrelated text", unrelated),
    ]


# ---- measuring -------------------------------------------------------------------------------


def agreement(answer: list[int], reference: list[int]) -> float:
    """Share of the answer before it first differs from the reference."""
    same = 0
    for a, b in zip(answer, reference, strict=True):
        if a != b:
            break
        same += 1
    return same / len(reference)


def measure(plain: Server, shared: Server, case: Case, corpus: Corpus, *, turn: int) -> Timing:
    """Serve a case on both servers, emptied first; ``turn`` says which is asked first.

    The exact mode is asked in the first turn only: it costs another full prefill.
    """
    cached = [corpus.encode(text) for text in case.cached]
    prompt = corpus.encode(case.prompt)

    def prime(server: Server) -> None:
        server.flush()
        for ids in cached:
            server.ask(ids)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(prime, (plain, shared)))
    answers: dict[str, Answer] = {}
    for server in (plain, shared) if turn % 2 == 0 else (shared, plain):
        answers[server.spec.name] = server.ask(prompt, max_new_tokens=NEW_TOKENS)
    alone, ours = answers["plain"], answers["kvshare"]
    exact = None
    if turn == 0:
        exact = shared.ask(prompt, max_new_tokens=NEW_TOKENS, kvshare="exact").output_ids
    info = ours.kvshare
    tokens = {
        "prefix": info["exact_tokens"],
        "copied": info["fuzzy_tokens"],
        "recomputed": info["recomputed_tokens"],
    }
    return Timing(
        prompt_tokens=len(prompt),
        plain_s=alone.ttft_s,
        kvshare_s=ours.ttft_s,
        tokens={**tokens, "new": len(prompt) - sum(tokens.values())},
        agreement=agreement(ours.output_ids, alone.output_ids),
        exact_agreement=None if exact is None else agreement(exact, alone.output_ids),
        declined=info["declined"],
    )


def run(plain: Server, shared: Server, corpus: Corpus, args: argparse.Namespace) -> list[Scenario]:
    kinds = scenarios()
    turns = [(turn, kind) for turn in range(args.repeats) for kind in kinds]
    with _bench.Progress(len(turns)) as bar:
        bar.say("warming up")
        measure(plain, shared, moved(corpus, args.tokens // 3), corpus, turn=1)
        for turn, kind in turns:
            bar.say(kind.title)
            case = kind.make(corpus, args.tokens)
            kind.timings.append(measure(plain, shared, case, corpus, turn=turn))
            bar.update()
        bar.say("measured")
    return kinds


# ---- telling ---------------------------------------------------------------------------------


def show_table(kinds: list[Scenario]) -> str:
    head = (
        "scenario", "tokens", "TTFT plain", "TTFT kvshare", "faster",
        "prefix", "reused", "recomputed", "agree", "agree exact",
    )  # fmt: skip
    rows = [
        (
            kind.title,
            f"{kind.mean(lambda t: t.prompt_tokens):.0f}",
            f"{kind.plain_s:.3f} s",
            f"{kind.kvshare_s:.3f} s",
            f"{kind.ratio:.2f}x",
            *(f"{kind.share(part):.0%}" for part in ("prefix", "copied", "recomputed")),
            f"{kind.mean(lambda t: t.agreement):.0%}",
            f"{kind.exact_agreement:.0%}",
        )
        for kind in kinds
    ]
    return _bench.table(head, rows)


LEGEND = f"""
tokens      length of the prompt; both servers had cached the same earlier texts
TTFT        time to the first streamed token, median over the repeats
faster      median of the repeats' own ratios, each measured side by side
prefix      share of the prompt found as an exact prefix (SGLang's own cache; both servers)
reused      share copied from other places of the cache by kvshare; 'recomputed' was found there
            too, but is computed again to repair it; the rest of the prompt is new text
agree       leading greedy tokens (of {NEW_TOKENS}) equal to the plain server's full prefill
agree exact the same for a request that asks kvshare for exact service: should be 100%"""


def about_model(model: _models.Model, *, trained: bool) -> str:
    if trained:
        return f"model: the small trained reader of the tests, {model.path.name}"
    return (
        f"model: {model.path.name}, a small Llama with random weights made on this machine.\n"
        "Random weights show the speed and the mechanics: the work per token is that of a trained\n"
        "model of this shape, and exact service must agree to the token. They cannot show answer\n"
        "quality: a random model smears the first words of a text over all that follows and picks\n"
        "its tokens by tiny margins, so 'agree' is often 0% where the text before a passage\n"
        "changed. That says that the outputs differ, not that a trained model's answer is worse."
    )


def draw(kinds: list[Scenario], path: Path, *, subtitle: str) -> None:
    """The table as a picture: times on the left, what became of the prompt on the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (times, parts) = plt.subplots(
        1, 2, figsize=(12, 4.6), sharey=True, gridspec_kw={"width_ratios": (1.25, 1)}
    )
    rows = list(range(len(kinds)))
    _draw_times(times, kinds, rows)
    _draw_parts(parts, kinds, rows)
    figure.suptitle(
        "SGLang with and without kvshare", x=0.01, y=0.99, ha="left", fontsize=14, weight="bold"
    )
    figure.text(0.01, 0.905, subtitle, ha="left", fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0, 1, 0.91), w_pad=2.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_times(axes: Any, kinds: list[Scenario], rows: list[int]) -> None:
    height = 0.36
    axes.barh(
        [y - height / 2 for y in rows],
        [k.plain_s for k in kinds],
        height,
        color=GREY,
        label="plain",
    )
    axes.barh(
        [y + height / 2 for y in rows],
        [k.kvshare_s for k in kinds],
        height,
        color=BLUE,
        label="kvshare",
    )
    longest = max(max(k.plain_s, k.kvshare_s) for k in kinds)
    for y, kind in zip(rows, kinds, strict=True):
        axes.text(kind.plain_s + longest * 0.012, y - height / 2, f"{kind.plain_s:.2f} s",
                  va="center", fontsize=9, color="#666666")  # fmt: skip
        axes.text(kind.kvshare_s + longest * 0.012, y + height / 2,
                  f"{kind.kvshare_s:.2f} s   {kind.ratio:.1f}x",
                  va="center", fontsize=9, weight="bold", color=BLUE)  # fmt: skip
    axes.set_yticks(rows, [kind.title for kind in kinds])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, longest * 1.16)
    axes.set_xlabel("seconds")
    axes.set_title("Time to first token (less is better)", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_parts(axes: Any, kinds: list[Scenario], rows: list[int]) -> None:
    looks = (
        ("prefix", "exact prefix", "#8fb08c", "white"),
        ("copied", "reused", BLUE, "white"),
        ("recomputed", "recomputed", ORANGE, "white"),
        ("new", "new text", LIGHT, "#6b4a2b"),
    )
    left = [0.0] * len(kinds)
    for part, label, colour, ink in looks:
        widths = [100 * kind.share(part) for kind in kinds]
        axes.barh(rows, widths, 0.5, left=left, color=colour, label=label)
        for y, start, width in zip(rows, left, widths, strict=True):
            if width >= 6:
                axes.text(start + width / 2, y, f"{width:.0f}%",
                          ha="center", va="center", fontsize=9, color=ink)  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("% of the prompt's tokens")
    axes.set_title("What kvshare did with the prompt", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def as_json(kinds: list[Scenario], env: dict[str, Any]) -> dict[str, Any]:
    return {
        "scenarios": [
            {"title": kind.title, "timings": [t._asdict() for t in kind.timings]} for kind in kinds
        ],
        "env": env,
    }


# ---- the program -----------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=_bench.ROOT / "out", metavar="DIR",
        help="where demo.png and demo.json go (default: out/)")  # fmt: skip
    add("--port", type=int, help="plain's port; kvshare takes the next (default: any free ones)")
    add("--model", help="model directory to time (default: a small random Llama, made on the spot)")
    add("--answers", type=int, default=4, help="prompts of each kind given to the trained reader")
    add("--tokens", type=int, default=2400, help="length of a text in tokens")
    add("--repeats", type=int, default=4, help="fresh texts for each scenario (even: each server "
        "is asked first in half of them)")  # fmt: skip
    add("--threads", type=int, default=min(_bench.cores(), 8), help="OpenMP threads of each server")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--server-arg", action="append", default=[], metavar="ARG",
        help="one more argument for both servers, as --server-arg=--flag")  # fmt: skip
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 300 <= args.tokens <= 16000:
        parser.error(f"--tokens must be in [300, 16000], got {args.tokens}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    args.device = args.device or default_device()
    return args


def pick_model(args: argparse.Namespace) -> tuple[_models.Model, bool]:
    """The model, and whether it is trained. Shortens the texts to what the model can hold."""
    if args.model is not None:
        model, trained = _models.open_model(args.model), Path(args.model).is_dir()
    else:
        model, trained = _models.open_model("demo-29m"), False
    room = int(model.max_len / 1.25) - 300
    if args.tokens > room:
        print(f"texts cut to {room} tokens: the model holds {model.max_len}", file=sys.stderr)
        args.tokens = room
    return model, trained


def server_specs(model: _models.Model, args: argparse.Namespace) -> Iterator[ServerSpec]:
    for i, (name, flags) in enumerate((("plain", ()), ("kvshare", ("--kvshare",)))):
        yield ServerSpec(
            name=name,
            model=model.path,
            device=args.device,
            port=None if args.port is None else args.port + i,
            threads=args.threads,
            chunk=8192,
            args=(*flags, *args.server_arg),
        )


def main() -> int:
    args = parse()
    try:
        model, trained = pick_model(args)
    except FileNotFoundError as error:
        raise ScriptError(str(error)) from None
    print(about_model(model, trained=trained), flush=True)
    env = _bench.environment(model=model.path.name, device=args.device, threads=args.threads)
    _bench.warn_if_busy()
    corpus = Corpus(model.tokenizer(), seed=args.seed)
    with serve(*server_specs(model, args)) as (plain, shared):
        kinds = run(plain, shared, corpus, args)
    print(f"\n{show_table(kinds)}\n{LEGEND}")
    declined = {t.declined for kind in kinds[:3] for t in kind.timings} - {None}
    if declined:
        print(f"kvshare declined prompts that it should reuse: {', '.join(sorted(declined))}")
    weights = "trained reader" if trained else "random weights"
    machine = env["gpu"] if args.device == "cuda" else f"{env['cpu']}, {env['cores']} cores"
    draw(kinds, args.out / "demo.png", subtitle=f"{model.path.name} ({weights}), {machine}, "
         f"median of {args.repeats}, measured side by side")  # fmt: skip
    _bench.write_json(args.out / "demo.json", as_json(kinds, env))
    if args.answers and (_models.READER / "config.json").is_file():
        answers = ask_reader(args)
        print(f"\n{show_answers(answers)}")
        _bench.write_json(args.out / "demo.json", as_json(kinds, env) | {"answers": answers})
    print(f"\nchart: {args.out / 'demo.png'}   numbers: {args.out / 'demo.json'}")
    return 1 if declined else 0


if __name__ == "__main__":
    run_main(main)
