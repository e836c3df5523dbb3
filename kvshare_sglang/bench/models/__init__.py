"""Which model a name stands for: a directory, a small random Llama made here, or ``smollm2``.

The shape of a random model comes from a JSON file in this folder (a Hugging Face ``config.json``),
its weights from a fixed seed, and its tokenizer is a byte-level BPE trained on Python's own source.
Models are kept under ``.cache/models`` in the project's root and made only once.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from kvshare_sglang.bench import smollm2
from kvshare_sglang.bench.common import ROOT, ScriptError

SHAPES = Path(__file__).resolve().parent
READER = ROOT / "tests" / "data" / "reader"  # a small trained model, where the tests hold one
FETCHED = "smollm2"  # name of the model with real weights

_HOME = ROOT / ".cache" / "models"
_RECIPE = 1  # raise it when the same shape should give another model
_SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
_BPE_VOCAB = 4096
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Model(NamedTuple):
    """A model directory that SGLang can serve."""

    path: Path
    config: dict[str, Any]

    @property
    def max_len(self) -> int:
        return int(self.config["max_position_embeddings"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    def tokenizer(self) -> Any:
        """The tokenizer, as the ``tokenizers`` library knows it."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.path / "tokenizer.json"))


def load(path: Path) -> Model:
    """A model directory that exists already. Raises ScriptError without a config."""
    if not (path / "config.json").is_file():
        raise ScriptError(f"--model {path} holds no config.json")
    return Model(path, json.loads((path / "config.json").read_text()))


def make(shape: Path, *, seed: int = 0, weights: bool = True) -> Model:
    """The model of a shape file, made if it is not in the cache yet.

    Without ``weights`` the directory holds config and tokenizer only, for ``--load-format dummy``.
    """
    config = json.loads(shape.read_text())
    recipe = json.dumps([_RECIPE, config, seed, weights, sys.version_info[:2]], sort_keys=True)
    key = hashlib.sha256(recipe.encode()).hexdigest()[:10]
    path = _HOME / f"{shape.stem}-{key}"
    if path.exists():
        return load(path)
    _HOME.mkdir(parents=True, exist_ok=True)
    (_HOME.parent / ".gitignore").write_text("*\n")
    print(f"making {path.name} (once)", file=sys.stderr, flush=True)
    draft = Path(tempfile.mkdtemp(dir=_HOME, prefix="draft-"))
    try:
        _save_tokenizer(draft, max_len=config["max_position_embeddings"])
        if weights:
            _save_weights(draft, config, seed=seed)
        (draft / "config.json").write_text(json.dumps(config, indent=2))
        draft.chmod(0o755)
        os.replace(draft, path)
    except OSError:
        if not path.exists():  # somebody else may have made it meanwhile
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return load(path)


def is_made(path: Path) -> bool:
    """Whether ``make`` made it: random weights, so no answers that anyone could be careful with."""
    return (
        path.resolve().parent == _HOME.resolve()
        and re.fullmatch(r".+-[0-9a-f]{10}", path.name) is not None
    )


def open_model(name: str, *, dummy: bool = False) -> Model:
    """A model directory, or a shape file, or the name of a shape in this folder, or ``smollm2``,
    which is fetched the first time. Raises ScriptError on anything else."""
    if name == FETCHED:
        return load(smollm2.ensure())
    path = Path(name)
    if path.is_dir():
        return load(path)
    shape = path if path.is_file() else SHAPES / f"{name}.json"
    if not shape.is_file():
        known = ", ".join([FETCHED, *sorted(p.stem for p in SHAPES.glob("*.json"))])
        raise ScriptError(
            f"--model {name} is neither a model directory, a file nor one of: {known}"
        )
    return make(shape, weights=not dummy)


def _save_tokenizer(path: Path, *, max_len: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_BPE_VOCAB,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:150]
    bpe.train_from_iterator((p.read_text(errors="ignore") for p in sources), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        pad_token=_SPECIAL[1],
        model_max_length=max_len,
    )
    fast.chat_template = _CHAT
    fast.save_pretrained(path)


def _save_weights(path: Path, config: dict[str, Any], *, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**config)).float().save_pretrained(path)
