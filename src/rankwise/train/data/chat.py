"""Conversations, and a tokenizer's chat template that renders them: all of what they hold, or an error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rankwise.errors import DataError
from rankwise.train.data.messages import Message

Span = tuple[int, int]  # of characters

STAND_IN = "\ue000"  # put in a text's place, to see where a template renders it


@dataclass(frozen=True)
class Conversation:
    """Messages, and what else a chat template is given.

    Attributes:
        tools: the functions that the assistant may call, as JSON schemas.
        options: further variables of the template.
        given: how many messages are a prompt that the others complete; None where the assistant's are all alike.
        place: where it stands, for errors.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    given: int | None = None
    place: str = "prompt"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Conversation:
        """The conversation of a sample, in whose row each field is JSON."""
        tools, options = (json.loads(row[name] or "null") for name in ("tools", "chat_template_kwargs"))
        return cls(json.loads(row["messages"]), tools, options or {}, row["given"], row["place"])

    def until(self, count: int) -> Conversation:
        """Its first messages."""
        return replace(self, messages=self.messages[:count], given=None)

    def standing_in(self, index: int) -> Conversation:
        """The same with `STAND_IN` in the place of one message's text."""
        changed = self.messages[index] | {"content": STAND_IN}
        return replace(self, messages=[*self.messages[:index], changed, *self.messages[index + 1 :]])

    @property
    def turns(self) -> list[int]:
        """The assistant's messages, by their numbers."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        DataError: it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                "messages: expected a tokenizer with a chat_template, found none. Give it that of the model's "
                "instruction-tuned version, or bring the data into the prompt/completion form."
            )
        self.tokenizer = tokenizer
        self._marked: dict[str, str | None] = {}

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            prompt: end it with what asks for the assistant's next message.

        Raises:
            DataError: the template refuses it.
        """
        return self._render(conversation, self._source(conversation), add_generation_prompt=prompt)[0]

    def render_marked(self, conversation: Conversation) -> tuple[str, list[Span]] | None:
        """The text, and what the template's marks say the assistant wrote; None where it has no marks.

        A template of which TRL has a marked version is rendered by that.

        Raises:
            DataError: the template refuses it.
        """
        source = self._source(conversation)
        if source not in self._marked:
            self._marked[source] = self._marked_version(source)
        marked = self._marked[source]
        if marked is None:
            return None
        return self._render(conversation, marked, return_assistant_tokens_mask=True)

    def _source(self, conversation: Conversation) -> str:
        return str(self.tokenizer.get_chat_template(None, conversation.tools or None))

    def _marked_version(self, source: str) -> str | None:
        # TRL takes seconds to import, which rendering a prompt need not wait for.
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        if has_generation_markers(source):
            return source
        try:
            # TRL looks for the tokenizer's default template, which need not be the one for tools.
            known = source == self.tokenizer.get_chat_template()
            version: str | None = get_training_chat_template(self.tokenizer) if known else None
        except Exception:  # noqa: BLE001 (TRL knows it not, or could not run it; what it says comes when it is rendered)
            return None
        return version

    def _render(self, conversation: Conversation, source: str, **asked: bool) -> tuple[str, list[Span]]:
        messages = [self._message(message) for message in conversation.messages]
        variables = {**self.tokenizer.special_tokens_map, **conversation.options}
        try:
            (text,), marks = render_jinja_template(
                [messages], tools=conversation.tools or None, chat_template=source, **asked, **variables
            )
        except Exception as error:  # a template is a program, and can fail in any way
            raise DataError(
                f"{conversation.place}: the chat template refuses this conversation: {error} ({type(error).__name__}). "
                "Change its roles or fields, or leave it out."
            ) from error
        return text, marks[0] if marks else []

    def _message(self, message: Message) -> Message:
        """A message as the template takes it: without empty fields, and in one piece or in parts."""
        kept = {name: value for name, value in message.items() if value is not None}
        content = kept.get("content")
        if isinstance(content, list) and not self._takes_parts:
            kept["content"] = "".join(texts_of(message))
        if isinstance(content, str) and not self._takes_strings:
            kept["content"] = _parts(content)
        return kept

    @cached_property
    def _takes_parts(self) -> bool:
        return self._renders(_parts(STAND_IN))

    @cached_property
    def _takes_strings(self) -> bool:
        return self._renders(STAND_IN) or not self._takes_parts

    def _renders(self, content: str | list[Any]) -> bool:
        """Whether a text is rendered as such: not left out, and not as Python writes a list."""
        messages = [{"role": "user", "content": content}]
        variables = self.tokenizer.special_tokens_map
        try:
            (text,), _ = render_jinja_template(
                [messages], chat_template=self.tokenizer.get_chat_template(), **variables
            )
        except Exception:  # noqa: BLE001 (a template is a program, and can fail in any way)
            return False
        return STAND_IN in text and not any(f"{quote}{STAND_IN}" in text for quote in "'\"")

    def check_whole(self, conversation: Conversation, text: str) -> None:
        """Refuse what was rendered of a conversation if it is not all of it.

        Raises:
            DataError: a text, a tool or a call is left out.
        """
        for part, name in _named(conversation):
            if name not in text:
                raise self._leaves_out(conversation, f"{part} {name}")
        for index, message in enumerate(conversation.messages):
            if all(_stands_in(part, text) for part in texts_of(message)):
                continue
            changed = conversation.standing_in(index)
            if STAND_IN not in (self.render_marked(changed) or (self.render(changed),))[0]:
                raise self._leaves_out(conversation, f"messages[{index}], of the role {message['role']}")

    def _leaves_out(self, conversation: Conversation, what: str) -> DataError:
        return DataError(
            f"{conversation.place}: the chat template leaves out {what}: expected all of a conversation in what the "
            "model is trained on. Use a template that renders it, or take it out of the data."
        )


def texts_of(message: Message) -> list[str]:
    """The texts of a message, which is one, or has parts."""
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [] if content is None else [content]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _named(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """The functions that may be called, and those that are."""
    for tool in conversation.tools or ():
        yield "the tool", tool.get("function", tool)["name"]
    for message in conversation.messages:
        for call in message.get("tool_calls") or ():
            yield "the call of", call.get("function", call)["name"]


def _stands_in(part: str, text: str) -> bool:
    """Whether a text is in what was rendered: as it is, or as JSON, which templates make of a tool's answers."""
    return part.strip() in text or json.dumps(part, ensure_ascii=False)[1:-1] in text
