"""An answer's tokens as text, as they come."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what a tokenizer makes of a part of a character


class TextStream:
    """The text of an answer, piece by piece.

    A piece is given out once nothing that follows can change it: no character is half there, and no stop text may have
    begun in it. The pieces together are the answer.

    Attributes:
        stopped: whether a stop text has come; it and what follows are no part of the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._context = self._read = 0  # tokens that are decoded again, for what they do to the next; tokens given out
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is settled with one more token."""
        self._tokens.append(token)
        new = self._new_text()
        if new.endswith(_UNFINISHED):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._until_stop(self._held + new)

    def finish(self) -> str:
        """What was held back, once no token is to come."""
        if self.stopped:
            return ""
        text = self._until_stop(self._held + self._new_text())
        return text + self._held

    def _new_text(self) -> str:
        before = self._decoded(self._tokens[self._context : self._read])
        return self._decoded(self._tokens[self._context :])[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _until_stop(self, text: str) -> str:
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        begun = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


def _begun(text: str, stop: str) -> int:
    """How many letters at the end of a text a stop text may begin with."""
    return next(count for count in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:count]))
