"""Conversations in a file, in the spellings of OpenAI, TRL and ShareGPT → as chat templates take them."""

from __future__ import annotations

import json
from typing import Any

from rankwise.errors import DataError

Message = dict[str, Any]

MEDIA = ("image", "images", "audio", "audios", "video", "videos", "documents")

_ROLES = {  # of ShareGPT, and of OpenAI before there were tools
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}


def conversation(
    record: dict[str, Any], messages: Any, where: str, place: str, completion: Any = None, *, asks: bool = False
) -> dict[str, Any]:
    """A record's conversation, with what its chat template is given beside it.

    Args:
        messages: all of it, or the prompt that ``completion`` completes.
        where: the field that they stand in, for errors.
        asks: it is a prompt alone, of which nothing is learnt.
    """
    chat = _chat(messages, where)
    if system := text_of(record.get("system") or "", f"{place}: system"):
        if chat[0]["role"] == "system":
            raise DataError(
                f"{place}: expected one system message, found the field system and another in {where}. Keep one."
            )
        chat = [{"role": "system", "content": system}, *chat]
    given = None
    if completion is not None:
        given = len(chat)
        chat += _chat(completion, f"{place}: completion")
    if not asks and all(message["role"] != "assistant" for message in chat[given or 0 :]):
        raise DataError(f"{where}: expected at least one message of the assistant to learn from, found none.")
    tools = record.get("tools") or [{"type": "function", "function": each} for each in record.get("functions") or ()]
    return {
        "messages": chat,
        "tools": _tools(tools, f"{place}: tools"),
        "chat_template_kwargs": _options(record.get("chat_template_kwargs"), f"{place}: chat_template_kwargs"),
        "given": given,
    }


def turns_of_pairs(pairs: Any, place: str) -> list[tuple[str, str]]:
    """Alpaca's earlier turns: a list of [instruction, answer]."""
    if not isinstance(pairs, list):
        raise wrong_type(place, "a list of pairs [instruction, answer]", pairs)
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong_type(f"{place}[{index}]", "a pair [instruction, answer]", pair)
    return [
        (text_of(asked, f"{place}[{index}][0]"), text_of(answered, f"{place}[{index}][1]"))
        for index, (asked, answered) in enumerate(pairs)
    ]


_OTHER_WEIGHTS = {"train", "trainable", "loss", "masked"}  # other trainers' names for it


def _chat(value: Any, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise wrong_type(place, "a list of messages, at least one", value)
    return [_message(message, f"{place}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    """A message with all its fields, under the names that chat templates know."""
    if isinstance(value, dict) and {"from", "value"} <= value.keys():
        value = _of_sharegpt(value, place)
    if isinstance(value, dict) and value.get("function_call"):
        calls = [{"type": "function", "function": value["function_call"]}]
        value = {key: item for key, item in value.items() if key != "function_call"} | {"tool_calls": calls}
    if not isinstance(value, dict) or "role" not in value or not {"content", "tool_calls"} & value.keys():
        raise wrong_type(place, 'an object with "role" and "content" (ShareGPT: "from" and "value")', value)
    role = text_of(value["role"], f"{place}.role")
    message = value | {"role": _ROLES.get(role, role)}
    message["content"] = _content(value.get("content"), place, optional=bool(value.get("tool_calls")))
    for name in _OTHER_WEIGHTS & value.keys():
        raise wrong_type(f"{place}.{name}", "weight: 0 for what is not to be learnt, or no such field", value[name])
    if value.get("weight") not in (None, 0, 1):
        raise wrong_type(f"{place}.weight", "0, not to be learnt, or 1", value["weight"])
    if value.get("tool_calls"):
        message["tool_calls"] = _calls(value["tool_calls"], f"{place}.tool_calls")
    return message


def _of_sharegpt(value: Message, place: str) -> Message:
    kept = {key: item for key, item in value.items() if key not in ("from", "value")}
    sender = text_of(value["from"], f"{place}.from")
    message = kept | {"role": sender, "content": value["value"]}
    if sender != "function_call":
        return message
    call = _json(value["value"], f"{place}.value", dict, "a call as a JSON object with name and arguments")
    return message | {"role": "assistant", "content": None, "function_call": call}


def _content(value: Any, place: str, *, optional: bool) -> str | list[Any] | None:
    """A text, or a list of parts that are texts; nothing where a call stands for it."""
    if value is None and optional:
        return None
    if not isinstance(value, list):
        return text_of(value, f"{place}.content")
    for index, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            raise wrong_type(f"{place}.content[{index}]", 'a part {"type": "text", "text": ...}: only text', part)
    return [{"type": "text", "text": part["text"]} for part in value]


def _calls(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise wrong_type(place, "a list of calls", value)
    return [_call(call, f"{place}[{index}]") for index, call in enumerate(value)]


def _call(value: Any, place: str) -> dict[str, Any]:
    """A call whose arguments are an object, as templates take them; OpenAI writes them as JSON."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong_type(place, 'a call {"type": "function", "function": {"name": ..., "arguments": ...}}', value)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{place}.arguments", dict, "the arguments as a JSON object")
    function = function | {"arguments": arguments}
    return value | {"function": function} if "function" in value else function


def _tools(value: Any, place: str) -> list[Any] | None:
    tools = _json(value, place, list, "a list of tools, or that as JSON") if value else []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong_type(f"{place}[{index}]", "a JSON schema of a function, with its name", tool)
    return tools or None


def _options(value: Any, place: str) -> dict[str, Any] | None:
    options = _json(value, place, dict, "the template's variables by name, or that as JSON") if value else {}
    return options or None


def _json(value: Any, place: str, kind: type, expected: str) -> Any:
    """A value that some files hold as JSON."""
    content = value
    if isinstance(value, str):
        try:
            content = json.loads(value)
        except ValueError:
            raise wrong_type(place, expected, value) from None
    if not isinstance(content, kind):
        raise wrong_type(place, expected, value)
    return content


def text_of(value: Any, place: str) -> str:
    """A value that must be a string."""
    if not isinstance(value, str):
        raise wrong_type(place, "a string", value)
    return value


def wrong_type(place: str, expected: str, value: Any) -> DataError:
    """The error for a value of another type."""
    return DataError(f"{place}: expected {expected}, found {type(value).__name__}: {shortened(value)}.")


def shortened(value: Any) -> str:
    """A value, for a message."""
    text = repr(value.strip() if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
