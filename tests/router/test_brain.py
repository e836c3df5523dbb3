"""What is learned from who served, what a body says, and how the program is started."""

import pytest

from kvshare_sglang import wire
from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy.options import RequestOptions
from kvshare_sglang.router.__main__ import main, parse_worker
from kvshare_sglang.router.brain import Brain
from kvshare_sglang.router.chats import messages_of, options_of, tools_of
from kvshare_sglang.router.cost import UNSAID
from kvshare_sglang.router.metrics import Metrics
from kvshare_sglang.router.prompts import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    MESSAGES,
    MOST_IDS,
    MOST_TEXT,
    RESPONSES,
    Prompts,
)

URLS = ["http://a:1", "http://b:2", "http://c:3"]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def brain():
    return Brain(URLS, Prompts(), Metrics(), clock=Clock())


def decide(brain, best, body=None):
    """A decision for a worker: the others have more to do."""
    for i, one in enumerate(brain.index.workers):
        one.routed = {0: (0 if i == best else 10_000 + i, 0.0)}
    decision = brain.decide(GENERATE, body or {"input_ids": [1, 2, 3]})
    assert decision.best == best
    return decision


def test_a_stand_in_makes_the_worker_that_was_meant_avoided_and_teaches_no_key(brain):
    brain.doubted.clear()
    decision = decide(brain, 0)
    brain.served(decision, URLS[decision.second])
    assert brain.index.standings(0.0)[0].avoid
    assert brain.doubted == {0: decision.key}
    assert brain.keys.key([0, decision.second]) == (decision.key, decision.second)
    brain.served(decision, URLS[0] + "/")
    assert not brain.index.standings(0.0)[0].avoid


@pytest.mark.parametrize("url", [None, "http://someone:9"])
def test_an_answer_that_names_no_worker_of_ours_teaches_nothing(brain, url):
    decision = decide(brain, 0)
    brain.served(decision, url)
    assert not any(brain.index.standings(0.0)[i].avoid for i in range(3))


@pytest.mark.parametrize(
    ("path", "body", "header", "options", "namespace"),
    [
        (GENERATE, {"input_ids": [1]}, None, (None, UNSAID), (None, None)),
        (GENERATE, {"input_ids": [1]}, "auto", (None, "auto"), (None, None)),
        (GENERATE, {"input_ids": [1]}, "0.3", (0.3, "auto"), (None, None)),
        (
            GENERATE,
            {"input_ids": [1], "sampling_params": {"custom_params": {"kvshare": "exact"}}},
            "0.3",
            (None, "exact"),
            (None, None),
        ),
        (CHAT, {"input_ids": [1], "extra_key": "t", "cache_salt": ""}, "exact", (None, "exact"),
         (wire.name_of("t"), None)),
        (COMPLETIONS, {"input_ids": [1], "cache_salt": "s"}, None, (None, UNSAID),
         (None, wire.name_of("s"))),
        (COMPLETIONS, {"input_ids": [1], "lora_path": "x"}, None, (None, "exact"), ("\0x", None)),
        (GENERATE, {"input_ids": [1], "lora_path": "x", "extra_key": "t"}, None, (None, "exact"),
         (wire.name_of("t") + "\0x", None)),
        (CHAT, {"input_ids": [1], "model": "m: x"}, None, (None, "exact"), ("\0x", None)),
        (CHAT, {"input_ids": [1], "model": "s3://m"}, None, (None, UNSAID), (None, None)),
        (CHAT, {"input_ids": [1], "model": "s3://m:x"}, None, (None, "exact"), ("\0x", None)),
        (CHAT, {"input_ids": [1], "model": "m:"}, None, (None, UNSAID), (None, None)),
        (GENERATE, {"input_ids": [1], "model": "m:x"}, None, (None, UNSAID), (None, None)),
        (GENERATE, {"input_ids": [1]}, "nonsense", (None, UNSAID), (None, None)),
    ],
)  # fmt: skip
def test_a_body_and_its_header_say_what_is_asked_for(path, body, header, options, namespace):
    prompts = Prompts()
    prompts.models = frozenset(["s3://m"])
    reading = prompts.read(path, body, header)
    assert reading.tokens.tolist() == [1]
    assert reading.options == RequestOptions(options[1], options[0])
    assert reading.namespace == namespace
    if header == "0.3" and "sampling_params" not in body:
        assert reading.body["sampling_params"] == {"custom_params": {"kvshare": {"budget": 0.3}}}
    if header == "exact":
        assert reading.body["custom_params"] == {"kvshare": "exact"}


@pytest.mark.parametrize(
    "body",
    [None, [], 7, {}, {"input_ids": "a"}, {"input_ids": [-1]}, {"input_ids": [True]},
     {"input_ids": []}, {"input_ids": [[1]]}, {"messages": 3},
     {"input_ids": [1], "sampling_params": {"custom_params": {"kvshare": 9}}}],
)  # fmt: skip
@pytest.mark.parametrize("path", [GENERATE, CHAT, COMPLETIONS])
def test_a_body_that_cannot_be_read_is_handed_on(path, body):
    reading = Prompts().read(path, body)
    if path == GENERATE or not isinstance(body, dict) or "sampling_params" not in body:
        assert reading.tokens is None
    assert reading.body is None


class Letters:
    """A tokenizer that remembers how much it was given."""

    def __init__(self):
        self.given = []

    def encode(self, text, add_special_tokens=True):
        self.given.append(len(text))
        return list(text.encode())

    def apply_chat_template(self, messages, **_):
        return "".join(str(message) for message in messages)


IMAGE = [{"type": "image_url", "image_url": {"url": "data:" + "x" * 1000}}]
PARTS = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]
LONG = "x" * (MOST_TEXT + 1)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}


def test_a_prompt_of_very_many_tokens_goes_by_load():
    assert Prompts().read(GENERATE, {"input_ids": [1] * MOST_IDS}).tokens is not None
    assert Prompts().read(GENERATE, {"input_ids": [1] * (MOST_IDS + 1)}).tokens is None


@pytest.mark.parametrize(
    ("role", "handed_on"), [("system", True), ("System", False), ("tool", False), ("dev", False)]
)
def test_tokens_of_roles_that_sglang_may_write_otherwise_are_not_handed_on(role, handed_on):
    says = [{"role": role, "content": "a"}, {"role": "user", "content": "b"}]
    reading = Prompts(Letters()).read(CHAT, {"messages": says}, sure=True)
    assert reading.tokens is not None
    assert (reading.body is not None) == handed_on


@pytest.mark.parametrize(
    ("path", "body", "known"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hi"}]}, True),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}, CALL]}, True),
        (CHAT, {"messages": [{"role": "user", "content": IMAGE}]}, False),
        (CHAT, {"messages": [{"role": "user", "content": PARTS}]}, True),
        (CHAT, {"messages": [{"role": "user", "content": [*PARTS, *IMAGE]}]}, False),
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, False),
        (CHAT, {"messages": [{**CALL, "tool_calls": LONG}]}, False),
        (CHAT, {"messages": [{"role": "user", "content": 7}]}, False),
        (GENERATE, {"text": LONG}, False),
        (GENERATE, {"text": LONG[1:]}, True),
        (COMPLETIONS, {"prompt": LONG}, False),
        (COMPLETIONS, {"prompt": ["a", "b"]}, False),
        (COMPLETIONS, {"prompt": ["a"]}, True),
        (RESPONSES, {"input": "hi"}, True),
        (RESPONSES, {"input": LONG}, False),
        (RESPONSES, {"input": "hi", "previous_response_id": "r"}, False),
        (RESPONSES, {"input": [{"type": "image_generation_call"}]}, False),
        (RESPONSES, {}, False),
        (MESSAGES, {"messages": [{"role": "user", "content": PARTS}]}, True),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, False),
        (MESSAGES, {"messages": [{"role": "user", "content": 7}]}, False),
    ],
)
def test_only_texts_of_a_bounded_length_are_tokenised(path, body, known):
    tokenizer = Letters()
    reading = Prompts(tokenizer).read(path, body, sure=True)
    assert (reading.tokens is not None) == known
    assert bool(tokenizer.given) == known
    if not known:
        assert reading.body is None


@pytest.mark.parametrize(
    ("prompt", "ids"), [([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ([[1], [2]], None)]
)
def test_a_completion_may_come_as_tokens(prompt, ids):
    tokens = Prompts().read(COMPLETIONS, {"prompt": prompt}).tokens
    assert (None if tokens is None else tokens.tolist()) == ids


TURNS = [
    {"role": "system", "content": "be\nbrief"},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "found this"},
    {"role": "user", "content": "d"},
]  # fmt: skip


def part(text, kind="text"):
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [
            TURNS[0], {"role": "user", "content": [part("a"), part("b")]},
            {"role": "assistant", "content": "c", "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}]},
            *TURNS[3:]]}),
        (RESPONSES, {"instructions": "be\nbrief", "input": [
            {"role": "user", "content": [part("a", "input_text"), part("b", "input_text")]},
            {"type": "reasoning", "summary": []},
            {"type": "message", "role": "assistant", "content": [part("c", "output_text")]},
            {"type": "function_call", "name": "f", "arguments": '{"x":1}', "call_id": "1"},
            {"type": "function_call_output", "call_id": "1", "output": "found this"},
            {"role": "user", "content": "d"}]}),
        (MESSAGES, {"system": [part("be"), part("brief")], "messages": [
            {"role": "user", "content": [part("a"), part("b")]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm"}, part("c"),
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "content": [part("found"), part("this")]}, part("d")]}]}),
    ],
)  # fmt: skip
def test_a_conversation_is_the_same_in_each_protocol(path, body):
    assert messages_of(path, body) == TURNS
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    tools = {
        CHAT: [{"type": "function", "function": function}],
        RESPONSES: [{"type": "function", **function}, {"type": "web_search"}],
        MESSAGES: [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
    }
    assert tools_of(path, {"tools": tools[path]}) == tools[CHAT]
    assert not tools_of(path, {})


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        (None, "fg"),
        ("auto", "fg"),
        ("none", ""),
        ({"type": "function", "name": "g"}, "g"),
        ({"type": "function", "name": "h"}, ""),
        ({"type": "mcp", "name": "g"}, "fg"),  # it cannot be forced
    ],
)
def test_a_response_may_choose_among_its_tools(choice, named):
    tools = [{"type": "function", "name": name} for name in "fg"]
    told = tools_of(RESPONSES, {"tools": tools, "tool_choice": choice})
    assert [tool["function"]["name"] for tool in told or ()] == list(named)


def test_an_effort_of_a_response_is_told_to_the_template_as_one_of_a_chat():
    for effort in ("none", "low"):
        of_response = options_of(RESPONSES, {"reasoning": {"effort": effort}})
        assert of_response == options_of(CHAT, {"reasoning_effort": effort})
        assert of_response["enable_thinking"] == (effort != "none")


@pytest.mark.parametrize(
    "text", ["a:1", "ftp://a:1", "http://a", "http://a:x", "http://:1", "http://a:1/path", ""]
)
def test_a_worker_that_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="--worker"):
        parse_worker(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--worker", "http://a:1"], "--gateway must be given"),
        (["--worker", "x", "--gateway", "http://g:1"], "--worker must be"),
        (["--worker", "http://a:1=tcp://10.0.0.1:5", "--gateway", "http://g:1"],
         "without --stream-token-file (or KVSHARE_STREAM_TOKEN)"),
        (["--worker", "http://a:1", "--gateway", "http://g:1", "--stream-token-file", "s3cret"],
         "--stream-token-file must be"),
        (["--worker", "http://a:1", "--gateway", "http://g:1", "--worker-api-key-file", "s3cret"],
         "--worker-api-key-file must be"),
        (["--worker", "http://a:1=udp://x", "--gateway", "http://g:1"], "tcp://HOST:PORT or ipc"),
        (["--worker", "http://a:1", "--gateway", "http://g:1", "--model-path", "nowhere"],
         "--model-path"),
        (["--worker", "http://a:1", "--gateway", "http://g:1", "--drain-seconds=-1"], "0 or more"),
        (["--worker", "http://a:1"] * 65 + ["--gateway", "http://g:1"], "1 to 64"),
    ],
)  # fmt: skip
def test_a_bad_start_ends_with_one_line(words, said, capsys, monkeypatch):
    monkeypatch.delenv(wire.TOKEN_ENV, raising=False)
    assert main(words) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert said in told
    assert "s3cret" not in told


@pytest.mark.parametrize(
    ("endpoint", "token", "good"),
    [
        ("ipc:///run/x", "", True),
        ("tcp://127.0.0.1:5555", "", True),
        ("tcp://localhost:5555", "", True),
        ("tcp://[::1]:5555", "", True),
        ("tcp://0.0.0.0:5555", "", False),
        ("tcp://*:5555", "", False),
        ("tcp://127.evil.example:5555", "", False),
        ("tcp://127.1.2.3:5555", "", True),
        ("tcp://[::]:5555", "", False),
        ("ipc://@name", "", False),
        ("ipc://@name", "x" * 16, True),
        ("tcp://10.0.0.1:5555", "", False),
        ("tcp://10.0.0.1:5555", "x" * 16, True),
        ("tcp://10.0.0.1:5555", "short", False),
        ("tcp://127.0.0.1", "", False),
        ("tcp://127.0.0.1:0", "", False),
        ("tcp://127.0.0.1:99999", "", False),
        ("udp://127.0.0.1:5555", "", False),
        ("ipc://", "", False),
    ],
)
def test_a_stream_that_others_can_reach_needs_a_token(endpoint, token, good):
    if good:
        wire.check_endpoint(endpoint, token)
        return
    with pytest.raises(ConfigError, match="--kvshare-stream") as caught:
        wire.check_endpoint(endpoint, token)
    assert "short" not in str(caught.value)


def test_the_token_of_a_file_comes_before_that_of_the_environment(tmp_path):
    (tmp_path / "a").write_text(" a\n")
    (tmp_path / "empty").write_text("\n")
    assert wire.token_of(str(tmp_path / "a"), {wire.TOKEN_ENV: "b"}) == "a"
    assert wire.token_of("", {wire.TOKEN_ENV: "b"}) == "b"
    assert wire.token_of("", {}) == ""
    assert wire.token_of("", {wire.TOKEN_ENV: "b", "OTHER": "c"}, variable="OTHER") == "c"
    for bad in (str(tmp_path / "empty"), str(tmp_path), "not-a-file-but-the-token", "\0"):
        with pytest.raises(ConfigError, match="--kvshare-stream-token-file") as caught:
            wire.token_of(bad, {wire.TOKEN_ENV: "b"})
        assert bad not in str(caught.value)


def test_an_adapters_text_is_no_other_requests_and_its_twins_meet(brain):
    brain.doubted.clear()
    tokens = list(range(1000))
    for worker in range(3):
        brain.index.begin(worker, wire.Snapshot(1, 1, 0, 1, {}, []))
    adapted = {"input_ids": tokens, "lora_path": "x"}
    first = brain.sent(decide(brain, 2, adapted))
    brain.answered(first)
    for one in brain.index.workers:
        one.routed.clear()
    assert brain.decide(GENERATE, adapted).best == 2
    assert brain.decide(GENERATE, {"input_ids": tokens}).best == 0
    assert brain.decide(GENERATE, {**adapted, "lora_path": "y"}).best == 0
