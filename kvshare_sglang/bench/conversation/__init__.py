"""What conversations cost and what they answer, turn by turn, against stock SGLang.

Real servers, kvshare and stock side by side, the same requests. *Rows* are prompt tokens that ran:
they depend on no clock, and not on what the model can do. Prompts of ``tasks`` and ``load`` have
answers: these two go to the reader, keep a line for each prompt under ``--out``, and go on where
they were stopped.
"""

import argparse
import functools
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kvshare_sglang.bench import common, models, options, tables
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.conversation import histories, load, memory, questions, rows, samples
from kvshare_sglang.bench.conversation.histories import History, Text
from kvshare_sglang.bench.match import requests
from kvshare_sglang.bench.quality.cases import CASES, SIZE, Encoder, NoPrompt, cells, prompts
from kvshare_sglang.bench.server import Server, ServerSpec, add_server_arguments, serve
from kvshare_sglang.bench.tasks import TASKS
from kvshare_sglang.bench.text.lines import begin, fill

ROWS = ("repeat", "edits", "header", "together", "compaction", "file")
COSTS = (*ROWS, "samples", "memory")
ANSWERS = ("tasks", "load")
ROOM = 64  # tokens that are left for an answer

# What is shown: of which part of a result, the columns, and what makes rows of it.
TABLES: dict[str, tuple[str, dict[str, str], Callable[[Any], list[dict[str, Any]]]]] = {
    "rows": ("rows", rows.COLUMNS, rows.told),
    "samples": ("samples", samples.COLUMNS, list),
    "memory": ("memory", memory.COLUMNS, memory.told),
    "tasks": ("tasks", questions.COLUMNS, list),
    "turns": ("tasks", questions.BY_CELL, questions.by_cell),
    "load": ("load", load.COLUMNS, load.told),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    add = parser.add_argument
    add("--case", nargs="+", choices=(*COSTS, *ANSWERS),
        help="default: all but tasks and load; file where there is one")  # fmt: skip
    add("--short", action="store_true", help="the smallest form of each case, to see that it runs")
    add("--model", default="replay-5m", help="of cases without answers: directory or shape")
    add("--reader", type=Path, default=models.READER, metavar="DIR", help="of tasks and load")
    add("--chunk", type=int, default=2048, help="--chunked-prefill-size (default: SGLang's on CPU)")
    add("--max-total-tokens", type=int, default=131072, help="KV tokens of each server")
    add("--seed", type=int, default=0)
    add("--ours-arg", action="append", default=[], metavar="ARG",
        help="one more argument for servers with kvshare, as --ours-arg=--flag")  # fmt: skip
    add("--own-answers", action="store_true",
        help="histories go on with what each server answered, not with written words")  # fmt: skip
    add("--file", type=Path, nargs="+", default=[], metavar="FILE",
        help="case file: JSON lines with 'prompt', requests in order")  # fmt: skip
    add("--limit", type=int, metavar="N", help="requests of each file, from the first")
    add("--pairs", type=int, default=12, help="samples: pairs of prompts")
    add("--turns", type=int, default=1000, help="memory: requests")
    add("--n", type=int, default=300, help="tasks, load: prompts of each cell")
    add("--dialogue", type=int, nargs="+", default=questions.TURNS, help="tasks: turns of each")
    add("--new-text", type=int, default=0, metavar="TOKENS",
        help="tasks: prose in front of each later question")  # fmt: skip
    add("--task", nargs="+", choices=TASKS, default=questions.TASKS,
        help="lookup and few for load alone")  # fmt: skip
    add("--of", nargs="+", choices=CASES, metavar="CASE",
        help=f"tasks, load: what was cached, of {', '.join(CASES)}")  # fmt: skip
    add("--facts", type=int, default=48, help="tasks, load: sentences in a prompt")
    add("--chunks", type=int, nargs="+", default=load.CHUNKS, help="load: -1 is whole")
    add("--mixed", nargs="+", choices=("off", "on"), default=("off", "on"))
    add("--together", type=int, nargs="+", default=load.TOGETHER, help="load: prompts at once")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="tasks, load: a file for each cell; a new folder for each setting",
    )
    add("--result", type=Path, metavar="IN.json", help="show an earlier result, measure nothing")
    options.add_table(parser)


def run(args: argparse.Namespace) -> int:
    if args.result:
        result = common.read_result(args.result, "env")
        print(show(result))
    else:
        result = measure(args)
        common.report(args, show(result), result)
    if args.table:
        # Pages hold results of several runs, so a mark says which: that of its file.
        name = (args.result or args.json or Path("conversation")).stem
        made = {
            f"{name}-{what}": table(what, result[part])
            for what, (part, _, _) in TABLES.items()
            if part in result
        }
        print(f"tables of {args.table.name}: {', '.join(tables.write_marked(args.table, made))}")
    return 0


def show(result: dict[str, Any]) -> str:
    """All tables of a result, for a terminal."""
    return "\n\n".join(
        common.columns(make(result[part]), **columns)
        for part, columns, make in TABLES.values()
        if part in result
    )


def table(what: str, value: Any) -> list[str]:
    """One of them for a page."""
    _, columns, make = TABLES[what]
    head = [name.replace("_", " ") for name in columns]
    lines = [[cell.format_map(row) for cell in columns.values()] for row in make(value)]
    return tables.markdown(head, lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All cases that are asked for. Raises ScriptError on options that do not go together."""
    if args.short:
        args.pairs, args.turns, args.n = (
            min(args.pairs, 2), min(args.turns, 40), min(args.n, 8)
        )  # fmt: skip
        args.of, args.chunks, args.mixed = args.of or ["template"], [256], ["off"]
    args.case = args.case or [case for case in COSTS if args.file or case != "file"]
    if "file" in args.case and not args.file:
        raise ScriptError("--case file needs --file")
    if set(args.case) & set(ANSWERS) and not args.out:
        raise ScriptError("--case tasks and load need --out, a folder")
    if "tasks" in args.case and (flat := set(args.task) - set(questions.TASKS)):
        raise ScriptError(f"--case tasks has no questions of {', '.join(sorted(flat))}")
    result: dict[str, Any] = {}

    def found(name: str, value: Any) -> None:
        result[name] = value
        common.write_result(args, result)  # as far as it got: nothing is lost on the way

    if costs := [case for case in COSTS if case in args.case]:
        measure_costs(args, costs, found)
    if "tasks" in args.case:
        found("tasks", measure_tasks(args))
    if "load" in args.case:
        found("load", measure_load(args))
    return result


# ---- cases without answers -------------------------------------------------------------------


def measure_costs(
    args: argparse.Namespace, cases: list[str], found: Callable[[str, Any], None]
) -> None:
    model = models.open_model(args.model)
    tokenizer = model.tokenizer()
    room = min(model.max_len, args.max_total_tokens) - ROOM
    todo = [
        many for case in ROWS if case in cases for many in histories_of(args, case, tokenizer, room)
    ]
    with serve(*(spec(args, name, model.path) for name in ("stock", "ours"))) as (stock, ours):
        if todo:
            measure_rows(args, todo, stock, ours, found)
        if "samples" in cases:
            with common.Progress(2 * (args.pairs + 1), unit=" pairs") as bar:
                bar.say("samples")
                text = Text(tokenizer, seed=args.seed)
                timed = samples.measure([stock, ours], text, pairs=args.pairs, bar=bar)
            found("samples", timed)
        if "memory" in cases:
            text, rng = Text(tokenizer, seed=args.seed), random.Random(args.seed)
            steps = list(memory.steps(text, rng, args.turns))
            with common.Progress(2 * len(steps), unit=" requests") as bar:
                bar.say("memory")
                pools = memory.measure(stock, ours, steps, every=max(10, len(steps) // 20), bar=bar)
            found("memory", pools)


def spec(args: argparse.Namespace, name: str, model: Path, **other: Any) -> ServerSpec:
    """``stock`` is SGLang's own server, any other name one with kvshare's defaults."""
    flags = other.pop("flags", memory.FLAGS)
    kvshare = () if name.startswith("stock") else ("--kvshare", *args.ours_arg)
    return ServerSpec(
        name, model, args.device, threads=args.threads, chunk=other.pop("chunk", args.chunk),
        max_total_tokens=args.max_total_tokens, args=(*kvshare, *flags, *args.server_arg),
        overlap=True,
    )  # fmt: skip


def histories_of(
    args: argparse.Namespace, case: str, tokenizer: Any, room: int
) -> Iterator[list[History]]:
    """The histories of a case that fit into ``room`` tokens; those of a list go side by side."""
    rng = random.Random(args.seed)

    def text() -> Text:
        return Text(tokenizer, seed=rng.randrange(1 << 30))

    few = {"num_turns": 8} if args.short else {}
    size = {"size": 500} if args.short else {}
    if case == "repeat":
        yield from each(histories.repeats(text(), **size))
    elif case == "edits":
        for times in (1,) if args.short else (1, 2, 3, 8):
            yield [histories.edits(text(), times, **few, **size)]
    elif case == "header":
        yield [histories.headers(text(), **few, **size)]
    elif case == "together":
        yield histories.side_by_side(text(), **({"num": 3} if args.short else {}), **few, **size)
    elif case == "compaction":
        yield from each(histories.agents(text, rng, **few, **({"every": 4} if args.short else {})))
    else:
        for file in requests_of(args, tokenizer):
            fitting = [one.tolist() for one in file.prompts if len(one) <= room]
            if not fitting:
                raise ScriptError(f"{file.name}: no prompt has at most {room} tokens")
            yield from each(histories.traces(file.name, fitting, text()))


def each(alone: Iterable[History]) -> Iterator[list[History]]:
    """One after the other."""
    return ([history] for history in alone)


def requests_of(args: argparse.Namespace, tokenizer: Any) -> list[requests.Requests]:
    path = models.open_model(args.model).path
    try:
        return requests.load(args.file, tokenizer=path, limit=args.limit)
    except (OSError, KeyError, ValueError) as error:
        raise ScriptError(f"--file is no file of JSON lines with 'prompt': {error!r}") from None


def measure_rows(
    args: argparse.Namespace, todo: list[list[History]], stock: Server, ours: Server,
    found: Callable[[str, Any], None],
) -> None:  # fmt: skip
    summaries: list[dict[str, Any]] = []
    turns: dict[str, Any] = {}
    with common.Progress(2 * sum(len(many[0].turns) for many in todo), unit=" turns") as bar:
        for many in todo:
            name = many[0].name
            bar.say(name)
            turns[name] = rows.measure(stock, ours, many, own=args.own_answers, bar=bar)
            summaries.append(rows.summary(many[0], turns[name]))
            found("turns", turns)
            found("rows", summaries)


# ---- cases with answers ----------------------------------------------------------------------


def measure_tasks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fill the files of all cells, and sum them up."""
    encode, size, max_len = reader_of(args, "tasks")
    todo = [(t, c, n) for n in args.dialogue for t in args.task for c in args.of or questions.CASES]
    files = {cell: args.out / "tasks" / f"{cell[0]}-{cell[1]}-{cell[2]}.jsonl" for cell in todo}
    specs = [spec(args, name, args.reader, flags=()) for name in ("stock", "ours")]
    with (
        serve(*specs) as (stock, ours),
        common.Progress(len(todo) * args.n, unit=" dialogues") as bar,
    ):
        for (task, case, turns), file in files.items():
            bar.say(f"{task}, {case}, {turns} turns")
            made = questions.dialogues(
                encode, task, case, turns, size=size, max_len=max_len, new_text=args.new_text
            )
            try:
                fill(file, made, args.n, lambda many: [questions.line(stock, ours, *many)], bar)
            except NoPrompt as none:
                print(f"note: left out: {none}", file=sys.stderr)
    return [
        row
        for (task, case, _), file in files.items()
        for row in questions.summary(read(file, args.n), task=task, case=case)
    ]


def measure_load(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same of each load; a server starts only where one of its files is not full."""
    encode, size, max_len = reader_of(args, "load")
    todo = cells(args.task, args.of or CASES)
    ways = load.loads(args.chunks, [mixed == "on" for mixed in args.mixed], args.together)
    folder = args.out / "load"

    def file(way: load.Load, task: str, case: str) -> Path:
        return folder / f"{task}-{case}-{way}.jsonl"

    with common.Progress(len(ways) * len(todo) * args.n, unit=" prompts") as bar:
        for server_of in dict.fromkeys(way._replace(together=0) for way in ways):
            mine = [way for way in ways if way._replace(together=0) == server_of]
            if all(len(read(file(way, *c), args.n)) == args.n for way in mine for c in todo):
                bar.update(len(mine) * len(todo) * args.n)
                continue
            its = spec(args, str(server_of), args.reader, chunk=server_of.chunk,
                       flags=server_of.flags)  # fmt: skip
            with serve(its) as (server,):
                for way in mine:
                    for task, case in todo:
                        bar.say(f"{task}, {case}, {way}")
                        made = prompts(encode, task, case, n=args.n, size=size, max_len=max_len)
                        lines = functools.partial(load.lines, server, way)
                        fill(file(way, task, case), made, args.n, lines, bar, together=load.BATCH)
    full = {cell: read(file(ways[0], *cell), args.n) for cell in todo}
    return [
        load.summary(
            read(file(way, *cell), args.n), full[cell], way, task=cell[0], case=cell[1]
        )
        for cell in todo
        for way in ways
    ]  # fmt: skip


def reader_of(args: argparse.Namespace, folder: str) -> tuple[Encoder, Any, int]:
    model = models.load(args.reader)
    made = {name: getattr(args, name) for name in ("facts", "new_text", "server_arg", "ours_arg")}
    begin(args.out / folder, made | {"reader": model.path.name})
    return Encoder(model.path), SIZE._replace(facts=args.facts), model.max_len


def read(file: Path, n: int) -> list[dict[str, Any]]:
    """The first ``n`` lines of a file, none where it is not there yet."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()[:n]]
