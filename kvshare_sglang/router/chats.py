"""The messages of a chat as a template takes them, from the bodies of three protocols. Pure.

They only help to choose: SGLang goes by them in much the same way, and what differs (a space
between two parts, the order in which a tool is described) is found as moved text.
"""

from typing import Any

import orjson

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"

_TEXTS = ("text", "input_text", "output_text")
_THOUGHTS = ("reasoning", "thinking", "redacted_thinking")  # of earlier turns: templates drop them

Message = dict[str, Any]


class Unreadable(ValueError):
    """It holds what is no text, or what the router does not have."""


def messages_of(path: str, body: dict[str, Any]) -> list[Message]:
    """Raises Unreadable, and what comes of bodies that are none of the protocol's."""
    if path == RESPONSES:
        return _of_responses(body)
    if path == MESSAGES:
        return _of_anthropic(body)
    return [_of_chat(one) for one in body["messages"]]


def tools_of(path: str, body: dict[str, Any]) -> Any:
    """As chat completions have them: those that may be called."""
    tools = body.get("tools") or []
    if path in (RESPONSES, MESSAGES):
        tools = [
            {
                "type": "function",
                "function": {
                    "name": tool["name"],
                    "description": tool.get("description"),
                    "parameters": tool.get("input_schema", tool.get("parameters")),
                },
            }
            for tool in tools
            if "name" in tool
        ]
    choice = body.get("tool_choice") or {}
    if isinstance(choice, str):
        choice = {"type": choice}
    kind = choice.get("type", "function")
    if kind == "none":
        return None
    name = choice.get("name") or choice.get("function", {}).get("name")
    if name and kind in ("function", "custom", "tool"):
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    return tools or None


def options_of(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a template is told beside messages and tools. SGLang says both names of the switch for
    thinking; what it makes of an effort for a few models alone is not known here. Raises Unreadable
    where a client brings a template of its own."""
    given = body.get("chat_template_kwargs") or {}
    if "chat_template" in given:
        raise Unreadable("a template")
    thinks = None
    if path == MESSAGES:
        effort = (body.get("output_config") or {}).get("effort")
        effort = "max" if effort == "xhigh" else effort
        if said := body.get("thinking"):
            thinks = said["type"] != "disabled"
    else:
        said = body.get("reasoning") or {}
        effort = body.get("reasoning_effort") if path == CHAT else None
        effort = effort if said.get("effort") is None else said["effort"]
        if effort is not None:
            thinks = effort != "none"
        elif path == CHAT and said.get("enabled"):
            thinks = True
    options = {} if thinks is None else {"thinking": thinks, "enable_thinking": thinks}
    if effort is not None:
        options["reasoning_effort"] = effort
    return {**options, **given}


def _joined(content: Any, between: str = " ") -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(part.get("type") in _TEXTS for part in content):
        raise Unreadable("no text")
    return between.join(part["text"] for part in content)


def _call(name: str, arguments: Any) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": _parsed(arguments)}}


def _parsed(arguments: Any) -> Any:
    """As SGLang gives the arguments of a call to a template: an object, which clients write out.
    What is none it refuses."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _of_chat(message: Message) -> Message:
    content = message.get("content")
    out = {**message, "content": "" if content is None else _joined(content)}
    if message["role"] == "assistant" and message.get("tool_calls"):
        out["tool_calls"] = [
            {**call, "function": {**of, "arguments": _parsed(of.get("arguments"))}}
            for call in message["tool_calls"]
            for of in [call["function"]]
        ]
    return out


def _of_responses(body: dict[str, Any]) -> list[Message]:
    if body.get("previous_response_id"):
        raise Unreadable("what came before is the worker's")
    out: list[Message] = []
    if body.get("instructions"):
        out.append({"role": "system", "content": body["instructions"]})
    given = body["input"]
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        kind = item.get("type", "message")
        if kind == "function_call":
            if not out or out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": ""})
            call = _call(item["name"], item["arguments"])
            out[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            out.append({"role": "tool", "content": _joined(item["output"])})
        elif kind == "message":
            role = "system" if item["role"] == "developer" else item["role"]
            out.append({"role": role, "content": _joined(item["content"])})
        elif kind not in _THOUGHTS:
            raise Unreadable(kind)
    return out


def _of_anthropic(body: dict[str, Any]) -> list[Message]:
    out: list[Message] = []
    if body.get("system"):
        out.append({"role": "system", "content": _joined(body["system"], "\n")})
    for message in body["messages"]:
        if isinstance(message["content"], str):
            out.append({"role": message["role"], "content": message["content"]})
        else:
            out += _of_blocks(message["role"], message["content"])
    return out


def _of_blocks(role: str, blocks: list[Message]) -> list[Message]:
    """One turn of Anthropic's: the results of tools are messages of their own."""
    out: list[Message] = []
    texts: list[str] = []
    calls: list[Message] = []
    for block in blocks:
        kind = block["type"]
        if kind == "text":
            texts.append(block["text"])
        elif kind == "tool_use":
            calls.append(_call(block["name"], block["input"]))
        elif kind == "tool_result":
            if texts:
                out.append({"role": role, "content": " ".join(texts)})
                texts = []
            out.append({"role": "tool", "content": _joined(block.get("content", ""))})
        elif kind not in _THOUGHTS:
            raise Unreadable(kind)
    if texts or calls:
        last: Message = {"role": role, "content": " ".join(texts)}
        out.append({**last, "tool_calls": calls} if calls else last)
    return out
