"""Texts to ask about: prose from Python's own documentation, and request files."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens

_SHORT, _LONG = 120, 1200  # characters of a paragraph that is of use


class Corpus:
    """Paragraphs of the documentation that comes with Python, each given out once.

    After the prose come paragraphs of the standard library's source, so it does not run dry.
    """

    def __init__(self, tokenizer: Any, *, seed: int) -> None:
        self._tokenizer = tokenizer
        self._paragraphs = _paragraphs(np.random.default_rng(seed))

    def take(self, num_tokens: int) -> str:
        """Fresh text of at least ``num_tokens`` tokens, cut off at the next word."""
        parts: list[str] = []
        have = 0
        while have < num_tokens:
            words = next(self._paragraphs).split(" ")
            counts = np.cumsum([len(self.encode(" " + word)) for word in words])
            enough = int(np.searchsorted(counts, num_tokens - have)) + 1
            parts.append(" ".join(words[:enough]))
            have += len(self.encode(parts[-1] + "\n\n"))
        return "\n\n".join(parts)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)


def read_prompts(path: Path, *, limit: int) -> list[str]:
    """The first ``limit`` prompts of a file with a JSON object with ``prompt`` on each line."""
    prompts: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if len(prompts) >= limit:
                break
            if line.strip():
                prompts.append(json.loads(line)["prompt"])
    return prompts


def fitting(
    path: Path, encode: Callable[[str], Tokens], *, limit: int, most: int
) -> tuple[list[Tokens], int]:
    """Of the first ``limit`` prompts those of 1 to ``most`` tokens, and how many are others. Raises
    ScriptError where there are none, or the file is none of prompts."""
    try:
        texts = read_prompts(path, limit=limit)
    except (OSError, KeyError, ValueError) as error:
        raise ScriptError(f"{path} is no file of JSON lines with 'prompt': {error!r}") from None
    prompts = [encode(text) for text in texts]
    fits = [tokens for tokens in prompts if 0 < len(tokens) <= most]
    if not fits:
        raise ScriptError(f"no prompt of {path} has 1 to {most} tokens")
    return fits, len(prompts) - len(fits)


def _paragraphs(rng: np.random.Generator) -> Iterator[str]:
    seen: set[str] = set()
    for texts in (_prose, _source):
        found = {
            re.sub(r"[ \t]*\n[ \t]*", " ", part.strip())
            for text in texts()
            for part in re.split(r"\n\s*\n", text)
        }
        fresh = sorted(p for p in found - seen if _SHORT <= len(p) <= _LONG)
        seen.update(fresh)
        for i in rng.permutation(len(fresh)):
            yield fresh[i]
    raise RuntimeError("the texts are used up: ask for fewer repeats or shorter prompts")


def _prose() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    yield from topics.values()


def _source() -> Iterator[str]:
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        yield path.read_text(errors="ignore")
