"""The prompts of a calibration: prose with facts put in, moved and edited since it was cached."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench import passages
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.models import READER
from kvshare_sglang.bench.quality import cases
from kvshare_sglang.bench.tasks.python_docs import prose
from kvshare_sglang.radix_fuzzy.segments import common_prefix

PASSAGES = 4  # of a prompt; each about 100 tokens
SHORTEST, LONGEST = 250, 700  # characters of a passage
READ = ("hops", "state")  # tasks of the reader
SIZE, READER_HOLDS = cases.SIZE._replace(facts=48), 1024
CASES = {"moved": passages.splice, "edited": passages.edit, "among others": passages.among}


class Prompt(NamedTuple):
    """Tokens of a prompt, and of those that were cached before it; all int32."""

    case: str
    ids: np.ndarray
    cached: tuple[np.ndarray, ...]


def prompts(folder: Path, n: int, *, longest: int) -> list[Prompt]:
    """The first ``n`` prompts, in the chat of a model directory where it has one: always the same
    ones. Raises ScriptError where they do not fit into ``longest`` tokens."""
    if folder.resolve() == READER:
        return list(_of_the_reader(n))
    encode = _Encoder(folder)
    pool = [
        passages.Passage(i, text, ())
        for i, text in enumerate((*prose("test"), *prose("train")))
        if SHORTEST <= len(text) <= LONGEST
    ]
    rng = random.Random("calibrate")
    kinds = list(CASES.items())
    made: list[Prompt] = []
    while len(made) < n:
        name, case = kinds[len(made) % len(kinds)]
        scene, others = passages.codes(rng, pool, PASSAGES)
        asked = case(rng, scene, others)
        if asked is None:
            continue
        ids = encode.begun(asked.prompt, asked.told, asked.answers[0])
        one = Prompt(name, ids, tuple(encode.prompt(text) for text in asked.cached))
        if (most := max(map(len, (one.ids, *one.cached)))) + 64 > longest:
            raise ScriptError(f"the model holds {longest} tokens, a prompt here has {most}")
        made.append(one)
    return made


class _Encoder:
    """Text to tokens, in the chat of a model directory where it has one."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def prompt(self, text: str) -> np.ndarray:
        return self._tokens(self._chat(text))

    def begun(self, text: str, answer: str, code: str) -> np.ndarray:
        """A prompt and its answer up to the digits of ``code``: the next token is one that the
        prompt decides, where the first of an answer is nearly always "The"."""
        before = f"{self._chat(text)}{answer[: answer.rindex(code)]}"
        ids = self._tokens(before + code)
        other = self._tokens(f"{before}{9 - int(code[0])}{code[1:]}")
        return ids[: common_prefix(ids, other)]

    def _chat(self, text: str) -> str:
        if not self._tokenizer.chat_template:
            return f"{text}\nAnswer: "
        said = [{"role": "user", "content": text}]
        return str(
            self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        )

    def _tokens(self, text: str) -> np.ndarray:
        special = not self._tokenizer.chat_template  # a chat has its own
        code = self._tokenizer(text, add_special_tokens=special)
        return np.asarray(code["input_ids"], np.int32)


def _of_the_reader(n: int) -> Iterator[Prompt]:
    """The reader reads nothing but the tasks that it was trained on. Of another draw than what it
    is measured on."""
    encode = cases.Encoder(READER)
    kinds = [(task, case) for case in ("splice", "edit far", "template") for task in READ]
    streams = [
        cases.prompts(encode, task, case, n=n, size=SIZE, max_len=READER_HOLDS, draw=2)
        for task, case in kinds
    ]
    for i in range(n):
        one = next(streams[i % len(streams)])
        yield Prompt(kinds[i % len(kinds)][1], one.ids, tuple(one.cached))
