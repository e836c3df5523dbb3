"""What the process that tokenises adds to a request and to its answer, without a server."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy.options import with_salt
from kvshare_sglang.runtime import doors, versions


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


@pytest.fixture(params=["cache_salt", "extra_key"])
def field(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a tenant's name goes: SGLang 0.5.17 knows no salt."""
    name = str(request.param)
    monkeypatch.setattr(versions, "knows_salts", lambda: name == "cache_salt")
    if not hasattr(asking(["a"]), name):
        pytest.skip("this SGLang knows no salt")
    return name


def test_a_header_names_the_tenant_where_the_body_names_none_and_where_it_does(field: str) -> None:
    for given, inside in (
        (None, "edge"),
        ("", "edge"),
        ("edge", "edge"),
        ("edge2", "edge\0edge2"),
        ("other", "edge\0other"),
        ("other\0edge", "edge\0other\0edge"),
        (["a", ""], ["edge\0a", "edge"]),
    ):
        obj = asking(["a", "b"], **{field: given})
        for _ in range(2):  # a door may ask again with what it asked with before
            doors._obey_headers(obj, {"x-kvshare-salt": "edge"})
        assert getattr(obj, field) == inside
        obj.normalize_batch_and_arguments()  # SGLang takes it
        assert getattr(obj[0], field) == (inside[0] if isinstance(inside, list) else inside)
    alone = asking(["a"])
    doors._obey_headers(alone, {})
    assert getattr(alone, field) is None


def test_no_two_tenants_of_a_gateway_ever_share_a_name() -> None:
    """Whatever their clients say."""
    names = ("a", "b", "aa", "a-", "ab")
    said = [None, "", *names, *(f"{one}\0{other}" for one in names for other in names), "\0", "\0a"]
    spaces = [{with_salt(given, salt) for given in said} for salt in names]
    for i, one in enumerate(spaces):
        assert all(not one & other for other in spaces[:i])


@pytest.mark.parametrize("given", [5, ["a", 5], [["a"]], {"a": 1}, ["a", None, True]])
def test_a_name_that_is_no_text_leads_nowhere(field: str, given: Any) -> None:
    with pytest.raises(ConfigError, match="cache_salt must be a text, or a list of them, got"):
        doors._obey_headers(asking(["a", "b"], **{field: given}), {"x-kvshare-salt": "edge"})


def test_a_salt_and_a_key_are_no_other_salt() -> None:
    """SGLang 0.5.17 writes one behind the other."""

    def joined(salt: Any, key: Any) -> Any:
        asked = SimpleNamespace(cache_salt=salt, extra_key=key)
        plain = "".join(filter(None, (salt, key))) or None
        return doors.hook_compute_extra_key(lambda serving, one: plain, None, asked)

    assert joined("t1", "0") != joined("t10", None) == "t10"
    assert joined("t1", "0") != joined("t", "10")
    assert [joined(None, "k"), joined("", "k"), joined(None, None)] == ["k", "k", None]


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


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"x-kvshare", b"exact")],
        [(b"accept", b"exakt"), (b"accept", b"\xff")],
        [(b"x-kvshare-salt", b"t")],
        [(b"x-kvshare-salt", b"urn:t/7@b.c+d=" + b"x" * 242)],
    ],
)
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


@pytest.mark.parametrize(
    "bad", [[b""], [b" "], [b"x" * 257], [b"a b"], [b"a,b"], [b"\xc3\xa9"], [b"a\0b"], [b"a"] * 2]
)
def test_a_salt_that_is_no_name_or_comes_twice_is_refused(bad: list[bytes]) -> None:
    """A client's beside a gateway's: which is which cannot be told."""
    reached, (start, body) = through([(b"x-kvshare-salt", value) for value in bad])
    assert not reached
    assert start["status"] == 400
    message = json.loads(body["body"])["error"]["message"]
    assert message.startswith("the header X-KVShare-Salt must be ")
    if len(bad) == 1:
        asked = request(x_kvshare_salt=bad[0].decode("latin-1"))
        with pytest.raises(ConfigError, match="X-KVShare-Salt must be 1 to 256 visible"):
            asyncio.run(serve(Manager(), asking(["a"]), asked))


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
