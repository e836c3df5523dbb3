"""What a request may say at any door of a server, and where its answer says what was reused.

Every door (``/generate``, completions, chat, Responses, Anthropic's messages, Ollama's API, gRPC,
``Engine``) ends in ``TokenizerManager.generate_request``, in the process that tokenises.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from numbers import Integral
from typing import Any

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy import options
from kvshare_sglang.runtime import hooks, versions

# What the task that serves a request has seen of its answers: the record of each, by index.
_records: ContextVar[dict[int, Any]] = ContextVar("kvshare_records")


def hook_generate_request(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """AROUND ``TokenizerManager.generate_request``: all prompts of a request are judged before
    the first of them is sent."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if isinstance(obj, GenerateReqInput):
        try:
            if request is not None:
                _obey_headers(obj, request.headers)
            options.check(obj.sampling_params)
        except ConfigError as error:
            return _refusal(obj, error)
        if not obj.lora_path:  # SGLang finds the id by the path; no client may say it
            obj.lora_id = None
    answers = original(manager, obj, request)
    return answers if request is None else _watched(answers)


def _obey_headers(obj: Any, headers: Any) -> None:
    """What the headers of a request say goes where its body would have said it. Raises ConfigError
    on what cannot be had."""
    if asked := headers.get(options.HEADER):
        asked = options.parse_header(asked)
        obj.sampling_params = options.with_header(obj.sampling_params, asked)
    if (named := headers.get(options.SALT_HEADER)) is not None:
        field, salt = versions.salt_field(), options.parse_salt(named)
        setattr(obj, field, options.with_salt(getattr(obj, field), salt))


def hook_compute_extra_key(
    original: Callable[..., str | None], serving: Any, request: Any
) -> str | None:
    """AROUND ``_compute_extra_key`` (0.5.17), which writes salt and key one behind the other, so
    that ``t1`` with ``0`` would be ``t10``."""
    joined = original(serving, request)  # raises for what is no text
    salt, key = getattr(request, "cache_salt", None), getattr(request, "extra_key", None)
    return f"{salt}{options.BORDER}{key}" if salt and key else joined


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_whole(values: Any) -> bool:
    return values is None or (isinstance(values, list | tuple) and all(map(_is_whole, values)))


def _is_of_a_session(params: Any) -> bool:
    return params is None or (
        isinstance(params.id, str | None)
        and isinstance(params.rid, str | None)
        and (params.offset is None or _is_whole(params.offset))
    )


# What a request says of one prompt that goes on to the scheduler, or into the answer's times,
# without a look at it, and what it can be there. Lists are for several prompts: SGLang lets them
# pass beside one.
_TAKEN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rid": (lambda it: isinstance(it, str), "a text"),
    "extra_key": (lambda it: isinstance(it, str | None), "a text"),
    "cache_salt": (lambda it: isinstance(it, str | None), "a text"),
    "priority": (lambda it: it is None or _is_whole(it), "a whole number"),
    "received_time": (
        lambda it: it is None or (isinstance(it, int | float) and 0 <= it < 1e30),
        "seconds",
    ),
    "logprob_start_len": (lambda it: _is_whole(it) and it >= -1, "-1 or more"),
    "top_logprobs_num": (_is_whole, "a whole number"),
    "token_ids_logprob": (_are_whole, "a list of whole numbers"),
    "token_indices_to_pool": (_are_whole, "a list of whole numbers"),
    "return_hidden_states": (
        lambda it: isinstance(it, bool) or it == "last",
        'true, false or "last"',
    ),
    "session_params": (
        _is_of_a_session,
        "an object with texts for id and rid, and a whole number for offset",
    ),
}


def hook_tokenized(made: Any, manager: Any, asked: Any, *args: Any, **kw: Any) -> None:
    """AFTER ``_create_tokenized_object``, which makes of one prompt and what was ``asked`` of it
    what the scheduler gets: raises ConfigError for what is not ours and would end SGLang."""
    for name, (serves, allowed) in _TAKEN.items():
        said = made if hasattr(made, name) else asked
        if hasattr(said, name) and not serves(value := getattr(said, name)):
            raise ConfigError(name, value, allowed)
    given = made.positional_embed_overrides
    if given is not None:
        if not hasattr(given, "embeds"):
            raise ConfigError("positional_embed_overrides", given, "an object of SGLang's, no JSON")
        size, shape = manager.model_config.hidden_size, tuple(given.embeds.shape)
        if shape != (len(given.positions), size):
            raise ConfigError("embeddings of a prompt", shape, f"of {size} numbers each")


async def _refusal(obj: Any, error: ConfigError) -> AsyncIterator[Any]:
    """Raise where SGLang's own refusals are raised: as the first answer is asked for."""
    obj.normalize_batch_and_arguments()  # what cleans up after a stream reads what this sets
    raise error
    yield


async def _watched(answers: AsyncGenerator[Any, None]) -> AsyncIterator[Any]:
    """The answers as they are; remembers their records for who writes the usage."""
    seen: dict[int, Any] = {}
    _records.set(seen)
    async with aclosing(answers):
        async for answer in answers:
            if isinstance(answer, list):  # all prompts, or all samples, at once
                for index, one in enumerate(answer):
                    if column := one["meta_info"].get("kvshare"):
                        seen[index] = column[-1]
            elif column := answer["meta_info"].get("kvshare"):
                seen[answer.get("index", 0)] = column[-1]
            yield answer


def hook_answer(answer: Any, *args: Any, **kw: Any) -> None:
    """AFTER what builds the usage of an answer, or the answer: ``kvshare`` is a list with the
    record of each choice, as ``meta_info["kvshare"]`` is in ``/generate``."""
    if seen := _records.get(None):
        answer.kvshare = [seen[index] for index in sorted(seen)]


def hook_ollama_answer(_: None, answer: Any, *args: Any, **kw: Any) -> None:
    """AFTER the making of what Ollama's API answers: the whole, or the end of a stream."""
    if answer.done:
        hook_answer(answer)


class HeaderCheck:
    """ASGI middleware, in front of all others: a request knows of no other's records, and a bad
    header is a 400 also where SGLang would have begun to stream."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            # A server begins a request that was pipelined inside the context of the one before.
            _records.set({})
            headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
            try:
                options.asked_of(headers)
                options.salt_of(headers)
            except ConfigError as error:
                await _answer_400(str(error), send)
                return
        await self.app(scope, receive, send)


async def _answer_400(message: str, send: Any) -> None:
    """In the form that clients of OpenAI and of Anthropic both read."""
    error = {"message": message, "type": "invalid_request_error", "code": 400}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    body = json.dumps({"type": "error", "error": error}).encode()
    await send({"type": "http.response.body", "body": body})


def open_answers() -> None:
    """Let SGLang's models of answers carry ``kvshare``; one without it is written as before."""
    import importlib

    from pydantic import BaseModel

    for module, names in hooks.ANSWERS:
        held = vars(importlib.import_module(module))
        for name in names:
            held[name].model_config["extra"] = "allow"
        for model in list(held.values()):  # in the order of their definitions: parts before wholes
            is_model = isinstance(model, type) and issubclass(model, BaseModel)
            if is_model and model.__module__ == module:
                model.model_rebuild(force=True)


def install() -> None:
    """Put the doors in place in a process that tokenises; safe to call again.

    Raises SeamError naming what is missing.
    """
    from sglang.srt.entrypoints.http_server import app

    if all(hooks.applied(point) for point in hooks.DOORS):
        return
    hooks.register(hooks.DOORS)
    hooks.check(hooks.DOORS)
    open_answers()
    if app.middleware_stack is None:
        app.add_middleware(HeaderCheck)
    else:  # a tokenizer worker asks for its class when the app has started
        app.middleware_stack = HeaderCheck(app.middleware_stack)
