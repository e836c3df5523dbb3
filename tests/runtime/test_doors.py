"""What the process that tokenises adds to a request and to its answer, without a server."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.runtime import doors


class Manager:
    """Stands for SGLang's: answers twice for each prompt, the record comes with the first."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.closed = 0

    async def generate(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        self.asked.append(obj.sampling_params)
        try:
            for part in range(2):
                await asyncio.sleep(0)
                for index, name in enumerate(obj.text):
                    column = {"kvshare": [{"of": name}]} if part == 0 else {}
                    yield {"index": index, "meta_info": column}
        finally:
            self.closed += 1


def request(**headers: str) -> Any:
    return SimpleNamespace(headers={name.replace("_", "-"): text for name, text in headers.items()})


def asking(text: list[str], **more: Any) -> Any:
    from sglang.srt.managers.io_struct import GenerateReqInput

    return GenerateReqInput(text=text, **more)


async def serve(manager: Manager, obj: Any, asked: Any) -> Any:
    """What an endpoint does: iterate, then write the usage."""
    stream = doors.hook_generate_request(lambda m, *a: m.generate(*a), manager, obj, asked)
    async for _ in stream:
        pass
    usage = SimpleNamespace()
    doors.hook_answer(usage)
    return getattr(usage, "kvshare", None)


def test_each_task_tells_of_its_own_request() -> None:
    async def many() -> list[Any]:
        names = [[f"{i} {j}" for j in range(1 + i % 3)] for i in range(20)]
        tasks = [serve(Manager(), asking(text), request()) for text in names]
        found = await asyncio.gather(*(asyncio.create_task(task) for task in tasks))
        assert found == [[{"of": name} for name in text] for text in names]
        return found

    assert len(asyncio.run(many())) == 20


def test_a_request_that_another_left_its_context_to_knows_of_no_record() -> None:
    """uvicorn begins what was pipelined on a connection in the context of the answer before."""
    shown: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answer = SimpleNamespace()
        doors.hook_answer(answer)  # as Responses do before they generate
        shown.append(getattr(answer, "kvshare", None))

    async def both() -> None:
        (record,) = await serve(Manager(), asking(["a"]), request())
        assert record == {"of": "a"}
        scope = {"type": "http", "headers": []}
        await asyncio.create_task(doors.HeaderCheck(app)(scope, None, None))

    asyncio.run(both())
    assert shown == [None]


def test_who_asked_from_inside_is_told_by_the_answer_alone() -> None:
    """``Engine`` has no request; SGLang's own generator comes back as it is."""
    manager = Manager()
    plain = manager.generate(asking(["a"]))
    assert doors.hook_generate_request(lambda m, *a: plain, manager, asking(["a"])) is plain
    asyncio.run(plain.aclose())


def test_a_client_that_leaves_ends_the_request_at_once() -> None:
    async def leave() -> None:
        manager = Manager()
        original = doors.hook_generate_request(
            lambda m, *a: m.generate(*a), manager, asking(["a"]), request()
        )
        await anext(original)
        await original.aclose()
        assert manager.closed == 1

    asyncio.run(leave())


@pytest.mark.parametrize("asked", [None, request(), request(x_kvshare="exact")])
def test_a_bad_option_is_raised_with_the_first_answer_and_nothing_is_sent(asked: Any) -> None:
    manager = Manager()
    params = [{}, {"custom_params": {"kvshare": {"budget": 7}}}]
    obj = asking(["a", "b"], sampling_params=params)
    with pytest.raises(ConfigError, match=r"budget must be a number in \[0, 1\], got 7"):
        asyncio.run(serve(manager, obj, asked))
    assert not manager.asked
    assert not obj.is_single  # SGLang reads it when the client of a stream has gone


def test_a_header_reaches_the_request() -> None:
    manager = Manager()
    asyncio.run(serve(manager, asking(["a"]), request(x_kvshare="0.5")))
    assert manager.asked == [{"custom_params": {"kvshare": {"budget": 0.5}}}]
    with pytest.raises(ConfigError, match="X-KVShare"):
        asyncio.run(serve(manager, asking(["a"]), request(x_kvshare="half")))


def through(headers: list[tuple[bytes, bytes]], kind: str = "http") -> tuple[list[Any], list[Any]]:
    """What a check lets through to the application, and what it answers itself."""
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def send(event: Any) -> None:
        sent.append(event)

    scope = {"type": kind, "headers": headers}
    asyncio.run(doors.HeaderCheck(app)(scope, None, send))
    return reached, sent


@pytest.mark.parametrize("headers", [[], [(b"x-kvshare", b"exact")], [(b"accept", b"exakt")]])
def test_a_good_header_passes(headers: list[tuple[bytes, bytes]]) -> None:
    assert through(headers) == ([{"type": "http", "headers": headers}], [])


def test_what_is_no_request_passes() -> None:
    reached, sent = through([], kind="lifespan")
    assert (len(reached), sent) == (1, [])


@pytest.mark.parametrize("bad", [[b"exakt"], [b"\xff"], [b""], [b"exact", b"2"]])
def test_a_bad_header_is_answered_in_the_form_that_clients_read(bad: list[bytes]) -> None:
    reached, (start, body) = through([(b"x-kvshare", value) for value in bad])
    assert not reached
    assert start["status"] == 400
    answer = json.loads(body["body"])
    assert answer["type"] == "error"  # Anthropic's
    assert answer["error"]["type"] == "invalid_request_error"
    assert "the header X-KVShare must be" in answer["error"]["message"]


def test_answers_carry_a_record_and_are_as_before_without_one() -> None:
    from sglang.srt.entrypoints.anthropic import protocol as anthropic
    from sglang.srt.entrypoints.openai import protocol as openai

    def written() -> list[str]:
        usage = openai.UsageInfo(prompt_tokens=3)
        common = {"id": "x", "created": 1, "model": "m", "choices": []}
        said = anthropic.AnthropicUsage(input_tokens=3, output_tokens=1)
        whole = {"id": "x", "content": [], "model": "m", "usage": said}
        answers = [
            openai.ChatCompletionResponse(**common, usage=usage),
            openai.ChatCompletionStreamResponse(**common, usage=usage),
            openai.CompletionResponse(**common, usage=usage),
            openai.CompletionStreamResponse(**common, usage=usage),
            anthropic.AnthropicMessagesResponse(**whole),
        ]
        return [answer.model_dump_json() for answer in answers]

    before = written()
    doors.open_answers()
    assert written() == before
    record = [{"anything": {"at": ["all"]}}]
    for model in (openai.UsageInfo(prompt_tokens=3), anthropic.AnthropicUsage(input_tokens=3)):
        model.kvshare = record
        assert model.model_dump()["kvshare"] == record
    usage = openai.UsageInfo(prompt_tokens=3)
    usage.kvshare = record
    chunk = openai.ChatCompletionStreamResponse(id="x", choices=[], model="m", usage=usage)
    text = chunk.model_dump_json()
    assert json.loads(text)["usage"]["kvshare"] == record
    # Anthropic's stream is made from the text of a chat's.
    assert openai.ChatCompletionStreamResponse.model_validate_json(text).usage.kvshare == record
