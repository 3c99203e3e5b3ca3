"""Answers in OpenAI's form: whole, and as the chunks of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from rankwise.serve.engine import Piece


@dataclass
class AnswerForm(ABC):
    """How the answers to one request are written."""

    model: str
    tokenizer: PreTrainedTokenizerBase
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def choice(self, text: str) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """A piece of one."""

    @abstractmethod
    def logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What is reported of some tokens."""

    def whole(self, answers: Sequence[Sequence[Piece]], prompt_tokens: int) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            self._choice(index, pieces, self.choice("".join(piece.text for piece in pieces)))
            for index, pieces in enumerate(answers)
        ]
        written = sum(map(len, answers))
        return self._envelope(self.whole_object, choices) | {"usage": usage(prompt_tokens, written)}

    def chunk(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """The body of a stream's event."""
        return self._envelope(self.chunk_object, [self._choice(index, [piece], self.delta(piece, first=first))])

    def usage_chunk(self, prompt_tokens: int, written: int) -> dict[str, Any]:
        """The last event of a stream whose usage is asked for."""
        return self._envelope(self.chunk_object, []) | {"usage": usage(prompt_tokens, written)}

    def token_text(self, token: int) -> str:
        """One token as text."""
        return str(self.tokenizer.decode([token]))

    def _choice(self, index: int, pieces: Sequence[Piece], content: dict[str, Any]) -> dict[str, Any]:
        reported = self.logprobs(pieces) if pieces[0].logprobs is not None else None
        return {"index": index, **content, "logprobs": reported, "finish_reason": pieces[-1].finish_reason}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class CompletionForm(AnswerForm):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        return {"text": piece.text}

    def logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        reported = [(piece.token, piece.logprobs) for piece in pieces if piece.logprobs is not None]
        return {
            "tokens": [self.token_text(token) for token, _ in reported],
            "token_logprobs": [logprobs.logprob for _, logprobs in reported],
            "top_logprobs": [
                {self.token_text(token): value for token, value in logprobs.top} for _, logprobs in reported
            ],
        }


class ChatForm(AnswerForm):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        return {"delta": {**({"role": "assistant"} if first else {}), "content": piece.text}}

    def logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        reported = [(piece.token, piece.logprobs) for piece in pieces if piece.logprobs is not None]
        return {
            "content": [
                self._entry(token, logprobs.logprob)
                | {"top_logprobs": [self._entry(other, value) for other, value in logprobs.top]}
                for token, logprobs in reported
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(prompt_tokens: int, written: int) -> dict[str, int]:
    """Tokens read and written."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
