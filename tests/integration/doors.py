"""Each way to ask a server over HTTP: what a body looks like, where its answer tells of reuse."""

import json
from typing import Any, NamedTuple

import requests

VERTEX = "/predict"  # servers of tests are told so by AIP_PREDICT_ROUTE, as Vertex AI does


class Door(NamedTuple):
    """One way to ask. ``place``: where the record stands in an answer or its last event that has
    one; ``options``: where a body may say what it wants (None: nowhere)."""

    path: str
    place: tuple[str, ...]
    options: tuple[str, ...] | None = ("custom_params",)

    def body(self, text: str, **more: Any) -> dict[str, Any]:
        new = {"model": "x", "temperature": 0}
        native = {"sampling_params": {"temperature": 0, "max_new_tokens": 4}}
        ollama = {"model": "x", "options": {"temperature": 0, "num_predict": 4}, "stream": False}
        said: dict[str, Any] = {
            "/generate": {"text": text, **native},
            VERTEX: {"instances": [{"text": text}], "parameters": native | more},
            "/api/generate": {**ollama, "prompt": text},
            "/api/chat": {**ollama, **chat(text)},
            "/v1/completions": {**new, "prompt": text, "max_tokens": 4},
            "/v1/chat/completions": {**new, **chat(text), "max_tokens": 4},
            "/invocations": {**new, **chat(text), "max_tokens": 4},
            "/v1/messages": {**new, **chat(text), "max_tokens": 4},
            "/v1/responses": {**new, "input": text, "max_output_tokens": 4},
        }[self.path]
        openai = ("/v1/completions", "/v1/chat/completions", "/invocations")
        if more.get("stream") and self.path in openai:
            said["stream_options"] = {"include_usage": True}
        return said if self.path == VERTEX else {**said, **more}

    def asking(self, text: str, option: Any, **more: Any) -> dict[str, Any]:
        """A body with ``{"kvshare": option}``."""
        body = self.body(text, **more)
        assert self.options is not None
        inner = body
        for key in self.options[:-1]:
            inner = inner[key]
        inner[self.options[-1]] = {"kvshare": option}
        return body


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


DOORS = (
    Door("/generate", ("meta_info", "kvshare"), ("sampling_params", "custom_params")),
    Door("/v1/completions", ("usage", "kvshare")),
    Door("/v1/chat/completions", ("usage", "kvshare")),
    Door("/invocations", ("usage", "kvshare")),
    Door("/v1/messages", ("usage", "kvshare"), None),
    Door("/v1/responses", ("kvshare",), None),
    Door(VERTEX, ("meta_info", "kvshare"), ("parameters", "sampling_params", "custom_params")),
    Door("/api/chat", ("kvshare",), None),
    Door("/api/generate", ("kvshare",), None),
)
NATIVE = ("/generate", VERTEX)  # what they are told goes to SGLang as it is, and so comes back


def events(reply: requests.Response) -> list[dict[str, Any]]:
    """What an answer holds: one thing, or what a stream sent."""
    assert reply.status_code == 200, reply.text
    kind = reply.headers["content-type"]
    if "ndjson" in kind:
        return [json.loads(line) for line in reply.text.splitlines()]
    if "event-stream" not in kind:
        found = reply.json()
        if "predictions" in found:  # of one prompt, or a list as /generate answers
            found = found["predictions"][0 if len(found["predictions"]) == 1 else slice(None)]
        return [found]
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    found = [json.loads(line) for line in lines]
    # Responses wraps what it sends at its beginning and end.
    return [event.get("response", event) for event in found]


def told(door: Door, reply: requests.Response) -> list[dict[str, Any]]:
    """The records of an answer, of its last event that has them."""
    for event in reversed(events(reply)):
        value: Any = event
        for key in door.place:
            value = (value or {}).get(key)
        if value:
            return list(value)
    raise AssertionError(reply.text)
