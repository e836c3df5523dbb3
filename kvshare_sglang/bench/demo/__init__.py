"""Show a real SGLang server with and without kvshare, side by side, on texts that moved.

First a story: a chat model with real weights is asked about documents that move, are edited, and
are another tenant's. Then a table of times on longer texts: the same text after another preface, a
document with three edits, RAG passages in another order, and unrelated text. Each on two servers of
one model, one plain and one with ``--kvshare``, which get the same texts.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvshare_sglang.bench import common, models
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.demo import story
from kvshare_sglang.bench.demo.picture import draw
from kvshare_sglang.bench.demo.scenarios import NEW_TOKENS, Scenario, measure_all
from kvshare_sglang.bench.server import ServerSpec, add_server_arguments, serve
from kvshare_sglang.bench.smollm2 import ModelError
from kvshare_sglang.bench.texts import Corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    add = parser.add_argument
    add("--out", type=Path, default=common.ROOT / "out", metavar="DIR",
        help="where demo.png goes, and demo.json without --json (default: out/)")  # fmt: skip
    add("--port", type=int, help="plain's port; kvshare takes the next (default: any free ones)")
    add("--model", help="model directory to time (default: a small random Llama, made on the spot)")
    add("--story", action=argparse.BooleanOptionalAction, default=True,
        help="play the story (fetches SmolLM2-135M-Instruct once, 93 MB)")  # fmt: skip
    add("--answers", type=int, default=4,
        help="without a chat model: prompts of each kind for the trained reader")  # fmt: skip
    add("--tokens", type=int, default=2400, help="length of a text in tokens")
    add("--repeats", type=int, default=4, help="fresh texts for each scenario (even: each server "
        "is asked first in half of them)")  # fmt: skip
    add("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    if not 300 <= args.tokens <= 16000:
        raise ScriptError(f"--tokens must be in [300, 16000], got {args.tokens}")
    if args.repeats < 1:
        raise ScriptError(f"--repeats must be at least 1, got {args.repeats}")
    args.json = args.json or args.out / "demo.json"
    result: dict[str, Any] = {}
    print(common.how_busy(), flush=True)
    scenes = tell_story(args, result) if args.story else []
    told = bool(scenes)
    model, trained = pick_model(args)
    print(about_model(model, trained=trained), flush=True)
    env = common.environment()
    corpus = Corpus(model.tokenizer(), seed=args.seed)
    with serve(*server_specs(model, args)) as (plain, shared):
        kinds = measure_all(plain, shared, corpus, args)
    print(f"\n{show_table(kinds)}\n{LEGEND}")
    declined = {t.declined for kind in kinds[:3] for t in kind.timings if t.declined}
    missed = story.missed(scenes)
    if missed:
        print(f"kvshare copied nothing in acts of the story that it should: {', '.join(missed)}")
    if declined:
        print(f"kvshare declined prompts that it should reuse: {', '.join(sorted(declined))}")
    weights = "trained reader" if trained else "random weights"
    machine = env["gpu"] if args.device == "cuda" else f"{env['cpu']}, {env['cores']} cores"
    draw(kinds, args.out / "demo.png", subtitle=f"{model.path.name} ({weights}), {machine}, "
         f"median of {args.repeats}, measured side by side")  # fmt: skip
    result["scenarios"] = [
        {"title": kind.title, "timings": [t._asdict() for t in kind.timings]} for kind in kinds
    ]
    common.write_result(args, result, model=model.path.name)
    if not told and args.answers and (models.READER / "config.json").is_file():
        # Imported late: these prompts are those of the command quality, which needs torch.
        from kvshare_sglang.bench.demo.answers import ask_reader, show_answers

        result["answers"] = ask_reader(args)
        print(f"\n{show_answers(result['answers'])}")
        common.write_result(args, result, model=model.path.name)
    charts = f"{args.out / 'story.png'}, {args.out / 'demo.png'}" if told else args.out / "demo.png"
    print(f"\npictures: {charts}   numbers: {args.json}")
    return 1 if declined or missed else 0


def tell_story(args: argparse.Namespace, result: dict[str, Any]) -> list[story.Scene]:
    """Play it on the chat model and add it to ``result``. Without the model nothing, and why."""
    try:
        model = models.open_model(models.FETCHED)
    except ModelError as error:
        print(f"no chat model here: {error}; the trained reader answers instead", file=sys.stderr)
        return []
    machine = common.environment()
    name = "SmolLM2-135M-Instruct"
    print(f"A chat model with real weights, {name}, is asked about documents.", flush=True)
    with serve(*server_specs(model, args, "--kvshare-calibration", "auto")) as (plain, shared):
        scenes = story.play(plain, shared)
    print(f"\n{story.show(scenes)}\n")
    print(
        f"Documents: {story.SOURCE}. A model of this size is often wrong; what counts here is that"
        " both say\nthe same. The first question finds nothing to reuse, and another tenant's finds"
        " nothing of the first\ntenant's.\n"
    )
    result["story"] = [scene.to_json() for scene in scenes]
    where = (
        machine["gpu"] if args.device == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    )
    story.draw(scenes, args.out / "story.png", subtitle=f"{name} (real weights), {where}, one "
               f"question each; load before: {machine['load_1min_at_start']}")  # fmt: skip
    return scenes


def show_table(kinds: list[Scenario]) -> str:
    head = (
        "scenario", "tokens", "TTFT plain", "TTFT kvshare", "faster", "in CPU time",
        "prefix", "reused", "recomputed", "agree", "agree exact",
    )  # fmt: skip
    rows = [
        (
            kind.title,
            f"{kind.mean(lambda t: t.prompt_tokens):.0f}",
            f"{kind.plain_s:.3f} s",
            f"{kind.kvshare_s:.3f} s",
            f"{kind.ratio:.2f}x",
            f"{kind.cpu_ratio:.2f}x",
            *(f"{kind.share(part):.0%}" for part in ("prefix", "copied", "recomputed")),
            f"{kind.mean(lambda t: t.agreement):.0%}",
            f"{kind.exact_agreement:.0%}",
        )
        for kind in kinds
    ]
    return common.table(head, rows)


LEGEND = f"""
tokens      length of the prompt; both servers had cached the same earlier texts
TTFT        time to the first streamed token, median over the repeats
faster      median of the repeats' own ratios, each measured side by side; in CPU time: of the
            servers' processor time, which other work on the machine does not lengthen
prefix      share of the prompt found as an exact prefix (SGLang's own cache; both servers)
reused      share copied from other places of the cache by kvshare; 'recomputed' was found there
            too, but is computed again to repair it; the rest of the prompt is new text
agree       leading greedy tokens (of {NEW_TOKENS}) equal to the plain server's full prefill
agree exact the same for a request that asks kvshare for exact service: should be 100%"""


def about_model(model: models.Model, *, trained: bool) -> str:
    if trained:
        return f"model: {model.path.name}, with trained weights"
    return (
        f"model: {model.path.name}, a small Llama with random weights made on this machine.\n"
        "Random weights show the speed and the mechanics: the work per token is that of a trained\n"
        "model of this shape, and exact service must agree to the token. They cannot show answer\n"
        "quality: a random model smears the first words of a text over all that follows and picks\n"
        "its tokens by tiny margins, so 'agree' is often 0% where the text before a passage\n"
        "changed. That says that the outputs differ, not that a trained model's answer is worse."
    )


def pick_model(args: argparse.Namespace) -> tuple[models.Model, bool]:
    """The model, and whether it is trained. Shortens the texts to what the model can hold."""
    if args.model is not None:
        model = models.open_model(args.model)
        trained = args.model == models.FETCHED or Path(args.model).is_dir()
    else:
        model, trained = models.open_model("demo-29m"), False
    room = int(model.max_len / 1.25) - 300
    if args.tokens > room:
        print(f"texts cut to {room} tokens: the model holds {model.max_len}", file=sys.stderr)
        args.tokens = room
    return model, trained


def server_specs(model: models.Model, args: argparse.Namespace, *more: str) -> Iterator[ServerSpec]:
    """``more``: flags of the server with kvshare."""
    for i, (name, flags) in enumerate((("plain", ()), ("kvshare", ("--kvshare", *more)))):
        yield ServerSpec(
            name=name,
            model=model.path,
            device=args.device,
            port=None if args.port is None else args.port + i,
            threads=args.threads,
            chunk=8192,
            args=(*flags, *args.server_arg),
        )
