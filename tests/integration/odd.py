"""What a request may say that is wrong or odd, for every door to be tried with."""

import inspect
import math
import random
from collections.abc import Iterator
from typing import Any

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy import ttl
from kvshare_sglang.policy.options import parse_options

# Fields of a request to ``/generate``, and what a refusal says; None: SGLang serves it or says no.
FIELDS = (
    ({"input_ids": [10**9]}, "input_ids must be in [0, "),
    ({"input_ids": [5, -5]}, "the vocabulary, got -5"),
    ({"return_logprob": True, "logprob_start_len": -1000}, "logprob_start_len must be -1 or more"),
    ({"return_logprob": True, "logprob_start_len": [-5]}, "logprob_start_len must be -1 or more"),
    ({"return_logprob": True, "logprob_start_len": [1]}, "logprob_start_len must be -1 or more"),
    ({"return_logprob": True, "top_logprobs_num": 10**6}, "top_logprobs_num must be in [0, "),
    ({"return_logprob": True, "top_logprobs_num": -2}, None),
    ({"return_logprob": True, "top_logprobs_num": []}, "top_logprobs_num must be a whole number"),
    ({"top_logprobs_num": [1]}, "top_logprobs_num must be a whole number, got [1]"),
    ({"return_logprob": True, "token_ids_logprob": [10**9]}, "vocabulary"),
    ({"positional_embed_overrides": {"a": 1}}, "positional_embed_overrides must be"),
    ({"positional_embed_overrides": [1]}, "positional_embed_overrides must be"),
    ({"positional_embed_overrides": "x"}, "positional_embed_overrides must be"),
    ({"positional_embed_overrides": []}, "positional_embed_overrides must be"),
    ({"positional_embed_overrides": [None]}, "positional_embed_overrides must be"),
    ({"return_hidden_states": []}, "return_hidden_states must be true, false or"),
    ({"session_params": {"id": []}}, "session_params must be an object with texts for id and rid"),
    ({"sampling_params": {"stop_regex": "(?<=a+)b"}}, None),
    ({"sampling_params": {"min_new_tokens": 1, "stop_token_ids": [10**9]}}, "stop_token_ids must"),
    ({"sampling_params": {"min_new_tokens": 1, "stop_token_ids": [-5]}}, "the vocabulary, got -5"),
    ({"token_indices_to_pool": [9999]}, None),
    ({"token_indices_to_pool": [3]}, None),
    ({"token_indices_to_pool": [[3]]}, "token_indices_to_pool must be a list of whole numbers"),
    ({"return_logprob": True, "token_ids_logprob": [5, 6]}, None),
    ({"return_hidden_states": True}, None),
    ({"session_params": {"id": "none"}}, None),
    ({"lora_path": "none"}, None),
    ({"input_embeds": [[0.0, 1.0]]}, None),
    ({"image_data": "none"}, None),
    ({"bootstrap_room": 3}, None),
    ({"rid": ["a", "b"]}, None),
    ({"custom_logit_processor": "none"}, None),
    ({"sampling_params": {"max_new_tokens": 0}}, None),
    ({"sampling_params": {"max_new_tokens": 10**9}}, None),
    ({"sampling_params": {"n": 0}}, None),
    ({"sampling_params": {"stop": ["e", "", "t"], "max_new_tokens": 20}}, None),
    ({"sampling_params": {"json_schema": "{}"}}, None),
    ({"sampling_params": {"logit_bias": {"99999999": 1}}}, None),
)


# What each door but ``/generate``, at which SGLang 0.5.23 asks for types, hands on as it is.
PARAMETERS = (
    ({"top_k": 2**31}, "top_k must be a whole number up to 2147483647, got 2147483648"),
    ({"top_k": 1.5}, "top_k must be a whole number"),
    ({"logit_bias": {"5": "x"}}, "logit_bias of token 5 must be a number in"),
    ({"logit_bias": {"5": 1e39}, "top_k": 5}, "logit_bias of token 5 must be a number in"),
    ({"logit_bias": ""}, "logit_bias must be an object"),
    ({"stream_interval": "x"}, "stream_interval must be a number, got 'x'"),
    ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
    ({"beam_width": 1.5}, "beam_width must be a whole number"),
    ({"skip_special_tokens": 1}, "skip_special_tokens must be true or false"),
    ({"repetition_penalty": 1e-40, "top_k": 5}, "repetition_penalty must be a number of at least"),
    ({"temperature": 1e39, "top_k": 5}, "temperature must be 0 or a number in"),
    ({"is_normalized": True, "temperature": 0}, "temperature must be 0 or a number in"),
    ({"is_normalized": True, "stop_token_ids": 5}, "stop_token_ids must be a list of whole"),
    ({"json_schema": {"type": "object"}}, "json_schema must be a text, got {'type': 'object'}"),
)


def options(rng: random.Random, depth: int = 3) -> Any:
    """Something that JSON can say."""
    leaves = (None, True, False, 0, 1, -1, 0.5, 1e308, -1e-9, 2**63, 10**30, math.nan, math.inf)
    leaves += ("", "exact", "auto", "Exact", "\0", "é𝄞", "x" * 3000)
    roll = rng.random()
    if depth == 0 or roll < 0.4:
        return rng.choice(leaves)
    if roll < 0.6:
        return [options(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = rng.sample(
        ["mode", "budget", "doubt", "ttl", "", "kvshare", "0", "a" * 200], rng.randrange(4)
    )
    return {key: options(rng, depth - 1) for key in keys}


def numbers() -> Iterator[dict[str, Any]]:
    """Options with one key, at its limits, past them, and of other kinds."""
    for name, most in (("budget", 1), ("ttl", ttl.LONGEST)):
        for value in (0, most, 1e-9, -1e-9, most + 1, math.nan, math.inf, True, "1", [1], 10**30):
            yield {name: value}


def refusal(option: Any) -> str | None:
    """What every door must say of it; None for what is served."""
    try:
        parse_options({"kvshare": option})
    except ConfigError as error:
        return str(error)
    return None


def through_engine(engine: Any, prompt: list[int]) -> int:
    """Raise AssertionError unless ``Engine.generate`` refuses what it must in words, and goes on
    after each. Returns how much was tried."""
    rng = random.Random(11)
    known = inspect.signature(engine.generate).parameters
    good = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}

    def said(params: dict[str, Any], **more: Any) -> str | None:
        try:
            engine.generate(input_ids=prompt, sampling_params=params, **more)
        except Exception as error:  # an engine raises what a server answers
            return str(error)
        return None

    def lives() -> bool:
        return len(engine.generate(input_ids=[5], sampling_params=good)["output_ids"]) == 3

    tried = 0
    for option in [*[options(rng) for _ in range(60)], *numbers()]:
        words = refusal(option)
        assert said({**good, "custom_params": {"kvshare": option}}) == words, option
        tried += 1
    assert lives()
    for wrong, words in FIELDS:
        if set(wrong) <= {*known, "sampling_params"} and "input_ids" not in wrong:
            more = {name: value for name, value in wrong.items() if name != "sampling_params"}
            seen = said({**good, **wrong.get("sampling_params", {})}, **more)
            # Without a tokenizer SGLang knows no end of a text, and says that first.
            heard = (words or "", "skip_tokenizer_init=True")
            assert any(one in str(seen) for one in heard), (wrong, seen)
            assert lives(), wrong
            tried += 1
    for wrong, words in PARAMETERS:
        seen = said({"max_new_tokens": 2, **wrong})  # drawn: top_k counts
        assert words in str(seen), (wrong, seen)
        assert lives(), wrong
        tried += 1
    return tried
