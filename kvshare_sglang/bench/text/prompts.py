"""Which prompts are asked about real passages: for each task and case always the same ones."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvshare_sglang.bench import passages
from kvshare_sglang.bench.common import ROOT, ScriptError
from kvshare_sglang.bench.passages import Asked, Passage

SAMPLE = ROOT / "benchmarks" / "passages" / "xquad_sample.jsonl"
TASKS = {  # how scenes of passages are made, and how many passages are in a prompt
    "codes3": (passages.codes, 3),
    "codes5": (passages.codes, 5),
    "qa1": (passages.qa, 1),
    "qa2": (passages.qa, 2),
    "qa3": (passages.qa, 3),
}
ALONE = "alone"  # nothing is cached: what full prefill solves
CHAT = "chat"  # of several turns: the real server alone
CASES: dict[str, Callable[..., Asked | None]] = {
    ALONE: lambda rng, scene, others: Asked(
        passages.render(scene.passages, scene.question), (), scene.answers, scene.told
    ),
    "splice": passages.splice,
    "among": passages.among,
    CHAT: passages.chat,
    "edit": passages.edit,
    "moved edit": passages.moved_edit,
    "template": passages.template,
    "misled": passages.misled,
    "clock": passages.clock,
    "question first": passages.question_first,
    **{
        f"{kind} {where}": functools.partial(passages.small_edit, kind=kind, near=where == "near")
        for kind in passages.EDITS
        for where in ("near", "far")
    },
}
TRIES = 1000  # scenes in a row that a case may find nothing in


def pool(path: Path, *, longest: int) -> list[Passage]:
    """The passages of a file that have ``longest`` characters at most. Raises ScriptError where
    the file has another form."""
    try:
        found = passages.load(path)
    except OSError as error:
        raise ScriptError(f"--passages {path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        form = '{"article", "text", "qas": [{"q", "a": [..]}]}'
        raise ScriptError(f"--passages {path} must hold {form} on each line: {error!r}") from None
    return [p for p in found if len(p.text) <= longest]


def asked(
    pool: Sequence[Passage], task: str, case: str, *, filler: int = 0, draw: int = 0
) -> Iterator[Asked]:
    """Prompts without end, each with so many more passages as ``filler``; other ones for each
    ``draw``. Raises ScriptError where there are too few passages, or none for the case."""
    make, count = TASKS[task]
    if count == 1 and case.endswith(" far"):
        raise ScriptError(f"--case {case} needs another passage, and {task} has one")
    fit = [p for p in pool if p.qas] if make is passages.qa else pool
    if len(fit) < 2 * count + filler:
        raise ScriptError(
            f"{task} needs {2 * count + filler} passages in --passages that are no longer than"
            f" --longest, got {len(fit)}"
        )
    rng = random.Random(f"text {task} {case}" + (f" {draw}" if draw else ""))
    tried = 0
    while tried < TRIES:
        scene, others = make(rng, pool, count)
        if filler:
            scene = passages.longer(rng, scene, others, pool, filler)
        tried += 1
        if one := CASES[case](rng, scene, others):
            tried = 0
            yield one
    raise ScriptError(f"--case {case}: the passages have no such text ({TRIES} scenes of {task})")
