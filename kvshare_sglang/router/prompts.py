"""What a request's body says to the router: its tokens, whose text it may meet, what it asks for.

A body is rewritten to ``input_ids`` only where that is sure to give what the worker would have made
of it: the router's tokenizer was compared with the worker's, and the body holds nothing that
changes the prompt. Whatever else is handed on as it came; its tokens only help to choose.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang import wire
from kvshare_sglang.errors import ConfigError, KVShareError
from kvshare_sglang.policy.options import RequestOptions, parse_header, parse_options, with_header
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.router.chats import CHAT, MESSAGES, RESPONSES, messages_of, options_of, tools_of
from kvshare_sglang.router.cost import UNSAID
from kvshare_sglang.router.mirror import Namespace

GENERATE, COMPLETIONS = "/generate", "/v1/completions"
CHATS = (CHAT, RESPONSES, MESSAGES)
PATHS = (GENERATE, COMPLETIONS, *CHATS)
# Where a body can carry what X-KVShare asks for.
OPTION_PATHS = (GENERATE, COMPLETIONS, CHAT, "/invocations")
MOST_TEXT = 4 << 20  # characters that are tokenised, about a million tokens; with more: by load
MOST_IDS = 1 << 20  # tokens; a longer prompt is handed on unread
_ROLES = ("system", "user", "assistant")  # as SGLang writes them: it may change others
# Fields that leave the prompt what it is. A body with any other keeps its text.
_SAMPLING = frozenset(
    "model stream stream_options max_tokens max_completion_tokens temperature top_p top_k min_p"
    " frequency_penalty presence_penalty repetition_penalty n seed stop stop_token_ids stop_regex"
    " ignore_eos min_tokens logit_bias logprobs top_logprobs user rid priority custom_params"
    " extra_key cache_salt".split()
)
_PLAIN = {
    GENERATE: frozenset(
        "text sampling_params stream rid priority return_logprob top_logprobs_num"
        " logprob_start_len token_ids_logprob extra_key cache_salt".split()
    ),
    CHAT: _SAMPLING | {"messages"},
}
_TRIALS = (
    "Hello, world!  Two  spaces,\ttabs\n\nand lines. ",
    " leading, Ünïcödé, 汉字, \U0001f642, 1234567890, </s>, <|im_end|>",
)


class Reading(NamedTuple):
    """``tokens`` None: not known. ``options``: their mode is UNSAID where the body names none.
    ``body``: what to hand on, None: as it came. ``streams``: whether the answer comes token by
    token."""

    tokens: Tokens | None
    namespace: Namespace = (None, None)
    options: RequestOptions = RequestOptions(UNSAID)
    body: dict[str, Any] | None = None
    streams: bool = False


class Prompts:
    """Reads bodies with a tokenizer; without one only those that hold ``input_ids``. Any thread.
    ``models``: what the workers call what they serve, where that is known."""

    def __init__(self, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        self.models: frozenset[str] = frozenset()

    @classmethod
    def load(cls, path: str, *, trust_remote_code: bool = False) -> "Prompts":
        """With the tokenizer of a model directory. Raises ConfigError where there is none."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever it is, the start ends here
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError("--model-path", path, f"a model's folder ({reason})") from error
        if not tokenizer.is_fast:
            raise ConfigError("--model-path", path, "of a model with a fast tokenizer")
        return cls(tokenizer)

    @staticmethod
    def trials() -> list[tuple[str, dict[str, Any]]]:
        """Bodies for a worker's ``/tokenize``, by the path of which they are the trial. A server
        that knows ``add_generation_prompt`` there refuses it without a template of the model's."""
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": _TRIALS[1]},
            {"role": "assistant", "content": _TRIALS[0]},
            {"role": "user", "content": _TRIALS[0]},
        ]
        texts = [(GENERATE, {"prompt": text}) for text in _TRIALS]
        chats = [messages, messages[1:2], messages]
        bodies: list[dict[str, Any]] = [{"messages": chat} for chat in chats]
        bodies[-1]["add_generation_prompt"] = True
        return [*texts, *((CHAT, body) for body in bodies)]

    def agrees(self, path: str, trial: dict[str, Any], theirs: Any) -> bool:
        """Whether the worker's answer to a trial is what is made of it here."""
        body = {"text": trial["prompt"]} if path == GENERATE else trial
        try:
            mine = self._tokenize(path, body)
        except Exception:  # a template that does not take the trial: not sure then
            return False
        return mine is not None and mine == theirs

    def read(
        self, path: str, body: Any, header: str | None = None, *, sure: bool = False
    ) -> Reading:
        """``header``: X-KVShare, which the gateway drops; it goes into the body. ``sure``: the
        tokens may be handed on. A body that is no request's is the worker's to refuse: unknown."""
        if not isinstance(body, dict):
            return Reading(None)
        reading = self._read(path, body, header, sure=sure)
        return reading._replace(streams=body.get("stream") is True)

    def _read(self, path: str, body: dict[str, Any], header: str | None, *, sure: bool) -> Reading:
        changed = with_options(path, body, header)
        body = changed or body
        try:
            options = _options(_custom_params(path, body))
        except KVShareError:
            return Reading(None, body=changed)
        namespace = _text(body.get("extra_key")), _text(body.get("cache_salt"))
        if adapter := adapter_of(path, body, self.models):
            # The worker keeps its text under an id that only it knows: here under a name that is
            # nobody else's, so that no prefix is found, and twins are.
            options = RequestOptions("exact")
            namespace = f"{namespace[0] or ''}\0{adapter}", namespace[1]
        ids = body.get("input_ids")
        if ids is None and path == COMPLETIONS:
            ids = _only(body.get("prompt"))
        if isinstance(ids, list) and len(ids) > MOST_IDS:
            return Reading(None, namespace, options, changed)
        if _is_ids(ids):
            return Reading(np.array(ids, np.int32), namespace, options, changed)
        try:
            ids = self._tokenize(path, body)
        except Exception:
            ids = None
        if not ids:
            return Reading(None, namespace, options, changed)
        if sure and path in _PLAIN and body.keys() <= _PLAIN[path] and _is_plain(path, body):
            changed = {**body, "input_ids": ids}
            changed.pop("text", None)
        return Reading(np.array(ids, np.int32), namespace, options, changed)

    def _tokenize(self, path: str, body: dict[str, Any]) -> list[int] | None:
        if self._tokenizer is None:
            return None
        if path in CHATS:
            text = self._tokenizer.apply_chat_template(
                messages_of(path, body), tokenize=False, add_generation_prompt=True,
                tools=tools_of(path, body), **options_of(path, body),
            )  # fmt: skip
        else:
            text = body.get("text") if path == GENERATE else _only(body.get("prompt"))
        if not isinstance(text, str) or len(text) > MOST_TEXT:
            return None
        more = {"add_special_tokens": False} if path in CHATS else {}
        return list(self._tokenizer.encode(text, **more))


def _only(prompt: Any) -> Any:
    """Of a list of one prompt that one."""
    one = isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list)
    return prompt[0] if one else prompt


def _is_ids(ids: Any) -> bool:
    return (
        isinstance(ids, list) and bool(ids) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    )


def _is_plain(path: str, body: dict[str, Any]) -> bool:
    """Whether a chat is of plain texts, and the user's turn is the last."""
    if path == GENERATE:
        return True
    return body["messages"][-1].get("role") == "user" and all(
        message.keys() == {"role", "content"}
        and message["role"] in _ROLES
        and isinstance(message["content"], str)
        for message in body["messages"]
    )


def _text(name: Any) -> str | None:
    """SGLang takes an empty name for none."""
    return wire.name_of(name) if isinstance(name, str) and name else None


def adapter_of(path: str, body: dict[str, Any], models: Iterable[str] = ()) -> str | None:
    """The LoRA adapter that a body names, as SGLang reads it: ``model`` may be MODEL:ADAPTER, where
    a model's own name may hold colons too.

    >>> adapter_of(CHAT, {"model": "s3://m:a", "lora_path": "b"}, ["s3://m"])
    'a'
    >>> adapter_of(CHAT, {"model": "s3://m", "lora_path": "b"}, ["s3://m"])
    'b'
    """
    model = body.get("model")
    if path != GENERATE and isinstance(model, str) and model not in models:
        base = next((name for name in models if model.startswith(f"{name}:")), None)
        adapter = model[len(base) + 1 :] if base else model.partition(":")[2]
        if adapter.strip():
            return adapter.strip()
    named = body.get("lora_path")
    return str(named) if named else None


def _options(custom_params: Any) -> RequestOptions:
    """Raises ConfigError. What it gets by default shows whether a request names a mode."""
    asked = parse_options(custom_params, default="auto")
    said = asked == parse_options(custom_params, default="exact")
    return asked if said else asked._replace(mode=UNSAID)


def _custom_params(path: str, body: dict[str, Any]) -> Any:
    if path not in OPTION_PATHS:
        return None
    if path != GENERATE:
        return body.get("custom_params")
    sampling = body.get("sampling_params")
    return sampling.get("custom_params") if isinstance(sampling, dict) else None


def with_options(path: str, body: dict[str, Any], header: str | None) -> dict[str, Any] | None:
    """The body with what the header asks for; None where it is as it was. A bad header changes
    nothing, as behind the gateway alone."""
    if header is None or path not in OPTION_PATHS:
        return None
    try:
        asked = parse_header(header)
    except KVShareError:
        return None
    if path == GENERATE:
        old = body.get("sampling_params")
        new = with_header(old, asked)
        return None if new is old else {**body, "sampling_params": new}
    # With ``custom_params`` at its top the body is what ``sampling_params`` is elsewhere.
    changed = with_header(body, asked)
    return None if changed is body else changed
