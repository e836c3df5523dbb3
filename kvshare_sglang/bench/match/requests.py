"""Request files as token ids, kept in the user's cache folder.

A prompt is encoded as it is, with whatever special tokens its tokenizer adds: the files hold
rendered prompts, as one sends them to a completions endpoint, so no chat template is put around
them. Without a tokenizer, a byte-level BPE is trained on the files that are given.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvshare_sglang.radix_fuzzy.fingerprints import Tokens

VOCAB = 32_768
_RECIPE = "1"  # raise it when the same files should give other ids


class Requests(NamedTuple):
    """A file's prompts in order of arrival, and the namespace of each."""

    name: str
    prompts: list[Tokens]
    spaces: list[object]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts))


def load(files: Sequence[Path], *, tokenizer: Path | None, limit: int | None) -> list[Requests]:
    """Each file, tokenised; the slow work is done once for the same content.

    Raises OSError, KeyError or ValueError for a file that is no JSON lines with ``prompt``.
    """
    if tokenizer is None:
        path = _trained(files)
    else:
        path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    made_by = hashlib.sha256(path.read_bytes()).hexdigest()
    return [_tokenised(file, path, made_by, limit) for file in files]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvshare_sglang" / "bench_match"


def _lines(file: Path) -> Iterator[dict[str, object]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _key(*parts: bytes) -> str:
    whole = hashlib.sha256(_RECIPE.encode())
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:24]


def _trained(files: Sequence[Path]) -> Path:
    """The tokenizer of these files, trained if it was not yet."""
    contents = sorted(hashlib.sha256(file.read_bytes()).digest() for file in files)
    path = cache_folder() / f"bpe-{_key(*contents)}.json"
    if path.exists():
        return path
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(
        (str(line["prompt"]) for file in files for line in _lines(file)), trainer
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    model.save(str(draft))
    os.replace(draft, path)
    return path


def _tokenised(file: Path, tokenizer: Path, made_by: str, limit: int | None) -> Requests:
    path = cache_folder() / f"ids-{_key(made_by.encode(), file.read_bytes())}.npz"
    if not path.exists():
        from tokenizers import Tokenizer

        model = Tokenizer.from_file(str(tokenizer))
        lines = list(_lines(file))
        ids = [code.ids for code in model.encode_batch([str(line["prompt"]) for line in lines])]
        keep = [i for i, one in enumerate(ids) if len(one) > 1]
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.npz")
        np.savez(
            draft,
            tokens=np.concatenate([np.asarray(ids[i], np.int32) for i in keep]),
            lengths=np.array([len(ids[i]) for i in keep]),
            spaces=np.array([str(lines[i].get("extra_key") or "") for i in keep]),
        )
        os.replace(draft, path)
    with np.load(path) as stored:
        prompts = np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])
        spaces: list[object] = [space or None for space in stored["spaces"].tolist()]
    return Requests(file.stem, prompts[:limit], spaces[:limit])
