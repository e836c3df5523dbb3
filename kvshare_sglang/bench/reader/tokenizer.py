"""How the reader reads: word pieces of the prose, with each closed word as one token."""

import json
from pathlib import Path
from typing import Any

from kvshare_sglang.bench import tasks
from kvshare_sglang.bench.reader.model import MAX_LEN, VOCAB

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def make_tokenizer(out: Path) -> Any:
    """Byte-level BPE of the prose, with each closed word and two-digit number as one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def byte_level() -> Any:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)

    special = [BOS, EOS, PAD]
    closed = [byte_level().pre_tokenize_str(w)[0][0] for w in tasks.closed_words()]
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    small.train_from_iterator(tasks.prose("train"), trainer)
    model = json.loads(small.to_str())["model"]
    # the learned merges give way to the closed words, the last first
    merges = [tuple(m) for m in model["merges"]]
    words = sorted(model["vocab"], key=model["vocab"].get)
    base = words[: len(words) - len(merges)]
    while True:
        vocab = list(dict.fromkeys([*base, *closed, *("".join(m) for m in merges)]))
        if len(vocab) <= VOCAB:
            break
        merges = merges[: -(len(vocab) - VOCAB)]
    ids = {w: i for i, w in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        model_max_length=MAX_LEN,
    )  # fmt: skip
    fast.save_pretrained(out)
    return tokenizer
