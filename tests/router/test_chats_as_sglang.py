"""What a chat's template is given, against SGLang's own serving code."""

import pytest

from kvshare_sglang.router.prompts import CHAT, MESSAGES, Prompts

pytestmark = pytest.mark.sglang

MESSAGES_OF = {
    CHAT: [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function",
             "function": {"name": "f", "arguments": '{"path": "a.py", "n": [1, null]}'}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "found"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "this"}]},
        {"role": "user", "content": "go on"},
    ],
    MESSAGES: [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "c"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"path": "a.py", "n": [1]}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": "found"},
            {"type": "text", "text": "go on"}]},
    ],
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
TOOLS = {
    CHAT: [
        {"type": "function", "function": {"name": name, "description": "d", "parameters": SCHEMA}}
        for name in "fg"
    ],
    MESSAGES: [{"name": name, "description": "d", "input_schema": SCHEMA} for name in "fg"],
}


class Tokenizer:
    """Remembers what its template is given."""

    chat_template = ""

    def encode(self, text, **_):
        return [1]

    def decode(self, ids, **_):
        return ""

    def apply_chat_template(self, messages, *, tools=None, **options):
        self.given = messages, tools, options
        return "text"


class Unset:
    """An object of SGLang's of which only this is set."""

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __getattr__(self, name):
        return None


@pytest.fixture(scope="module")
def sglang():
    """Gives the path and the body of a request to SGLang; what the template gets of it."""
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
    from sglang.srt.entrypoints.openai import serving_chat
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    tokenizer = Tokenizer()
    config = Unset(
        hf_config=Unset(model_type="llama", architectures=[]), get_default_sampling_params=dict
    )
    manager = Unset(
        tokenizer=tokenizer, server_args=Unset(), model_config=config, config_value=lambda *_: None
    )
    template = Unset(jinja_template_content_format="string")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_chat, "get_serving", Unset)
        chats = serving_chat.OpenAIServingChat(manager, template)

        def given(path, body):
            body = {"model": "m", "max_tokens": 1, **body}
            if path == MESSAGES:
                body = AnthropicMessagesRequest(**body)
                request = AnthropicServing(chats)._convert_to_chat_completion_request(body)
            else:
                request = ChatCompletionRequest(**body)
            chats._convert_to_internal_request(request)
            return tokenizer.given

        yield given


def plain(given):
    """Without what a template need not be told: ids, what is not set, how it is called."""
    messages, tools, options = given
    calls = [
        [(call["function"]["name"], call["function"]["arguments"]) for call in said]
        for one in messages
        for said in [one.get("tool_calls") or []]
    ]
    told = [(one["role"], one["content"]) for one in messages]
    names = [tool["function"]["name"] for tool in tools or []]
    called = {"tokenize", "add_generation_prompt", "return_dict"}
    return told, calls, names, {k: v for k, v in options.items() if k not in called}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {}),
        *(
            (CHAT, {"tools": TOOLS[CHAT], **more})
            for more in (
                {},
                {"tool_choice": "none"},
                {"tool_choice": "required"},
                {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            )
        ),
        (CHAT, {"tools": [], "tool_choice": "auto"}),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": False, "more": [1]}}),
        (CHAT, {"reasoning_effort": "low"}),
        (CHAT, {"reasoning_effort": "none", "chat_template_kwargs": {"thinking": True}}),
        (CHAT, {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}),
        (CHAT, {"chat_template_kwargs": {"reasoning_effort": "high"}}),
        (CHAT, {"reasoning": {"effort": "none"}, "reasoning_effort": "low"}),
        (CHAT, {"reasoning": {"enabled": True}}),
        (CHAT, {"reasoning": {"enabled": False}}),
        (MESSAGES, {}),
        (MESSAGES, {"tools": TOOLS[MESSAGES]}),
        (MESSAGES, {"tools": TOOLS[MESSAGES], "tool_choice": {"type": "none"}}),
        (MESSAGES, {"tools": TOOLS[MESSAGES], "tool_choice": {"type": "any"}}),
        (MESSAGES, {"tools": TOOLS[MESSAGES], "tool_choice": {"type": "tool", "name": "g"}}),
        (MESSAGES, {"output_config": {"effort": "xhigh"}}),
    ],
)
def test_a_template_is_given_what_sglang_gives_it(sglang, path, more):
    body = {"messages": MESSAGES_OF[path], **more}
    tokenizer = Tokenizer()
    assert Prompts(tokenizer).read(path, body).tokens is not None
    assert plain(tokenizer.given) == plain(sglang(path, body))


def test_a_template_that_a_client_brings_is_not_run():
    body = {"messages": MESSAGES_OF[CHAT], "chat_template_kwargs": {"chat_template": "x"}}
    assert Prompts(Tokenizer()).read(CHAT, body).tokens is None
