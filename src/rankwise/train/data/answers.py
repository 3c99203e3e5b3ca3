"""Which parts of a conversation's text are to be learnt.

Marks in the template (``{% generation %}``) say it. Without them it follows from what is rendered with and without a
message: an answer begins where the text ends that the model is asked with, and ends where the conversation up to it
does. Both are exact, or refused: where a template renders a message otherwise once others follow, no part of the text
is what the model would have written.
"""

from __future__ import annotations

from rankwise.errors import DataError
from rankwise.train.data.chat import STAND_IN, ChatTemplate, Conversation, Span


def answers(template: ChatTemplate, conversation: Conversation, turns: str = "all") -> tuple[str, list[Span]]:
    """The text of a conversation, and the parts of it that are to be learnt.

    Args:
        turns: of the assistant's messages `"all"`, or the `"last"`, without those of ``weight`` 0. Of a prompt with a
            completion the completion is learnt.

    Raises:
        DataError: the template refuses it or leaves something out, or the parts cannot be told exactly.
    """
    marked = template.render_marked(conversation) if conversation.given is None else None
    text = template.render(conversation) if marked is None else marked[0]
    template.check_whole(conversation, text)
    learnt = _learnt(conversation, turns)
    if conversation.given is not None:
        spans = [(_start(template, conversation, conversation.given, text), len(text))]
    elif marked is None:
        spans = [
            (_start(template, conversation, turn, text), _end(template, conversation, turn, text)) for turn in learnt
        ]
    elif learnt == conversation.turns:
        spans = marked[1]
    else:
        spans = [mark for turn in learnt for mark in _marks_of(template, conversation, turn, marked[1])]
    if not spans or any(start >= end for start, end in spans):
        raise DataError(
            f"{conversation.place}: expected an answer to learn in what the chat template renders, found none."
        )
    return text, spans


def _learnt(conversation: Conversation, turns: str) -> list[int]:
    chosen = conversation.turns if turns == "all" else conversation.turns[-1:]
    return [turn for turn in chosen if conversation.messages[turn].get("weight") != 0]


def _marks_of(template: ChatTemplate, conversation: Conversation, turn: int, marks: list[Span]) -> list[Span]:
    """The marks of one message of the assistant's: those that come with it."""
    following = next((other for other in conversation.turns if other > turn), None)
    return marks[_mark_count(template, conversation, turn) : _mark_count(template, conversation, following)]


def _mark_count(template: ChatTemplate, conversation: Conversation, count: int | None) -> int | None:
    """How many marks the first messages have; None of all of them."""
    if not count:
        return count
    marked = template.render_marked(conversation.until(count))
    assert marked is not None
    return len(marked[1])


def _start(template: ChatTemplate, conversation: Conversation, turn: int, text: str) -> int:
    """Where the text that asks for a message ends.

    Some templates end it with more than they keep (Gemma 4: an empty thought): then where the two part.
    """
    if turn == 0:
        return template.render(conversation.standing_in(0)).find(STAND_IN)
    asked = template.render(conversation.until(turn), prompt=True)
    if text.startswith(asked):
        return len(asked)
    parted = _shared(template, text, asked)
    if parted < _shared(template, asked, template.render(conversation.until(turn))):
        raise _changed(conversation, turn, "the messages before")
    return parted


def _end(template: ChatTemplate, conversation: Conversation, turn: int, text: str) -> int:
    """Where a message ends.

    Some templates end a text with more than stands between two messages (Phi-3: the end token): it is not counted.
    """
    if turn + 1 == len(conversation.messages):
        return len(text)
    closed = template.render(conversation.until(turn + 1))
    asked = template.render(conversation.until(turn + 1), prompt=True)
    if not asked.startswith(closed):
        closed = closed[: _shared(template, closed, asked)]
    if not text.startswith(closed):
        raise _changed(conversation, turn, "this message")
    return len(closed)


def _shared(template: ChatTemplate, text: str, other: str) -> int:
    """How much of a text, in whole tokens, another begins with too."""
    pairs = enumerate(zip(text, other, strict=False))
    length = next((index for index, (one, two) in pairs if one != two), min(len(text), len(other)))
    tokens = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return next((start for start, end in tokens["offset_mapping"] if start < length < end), length)


def _changed(conversation: Conversation, turn: int, what: str) -> DataError:
    return DataError(
        f"{conversation.place}: messages[{turn}]: the chat template renders {what} otherwise once others follow, so no "
        "part of its text is what the model would have written. Set trained_turns: last, end conversations at the "
        "message to learn, or add {% generation %} marks to the template."
    )
