"""The engine: requests join and leave a running batch, whichever adapters they name (continuous batching).

One thread runs the model and changes which adapters are on it; everybody else hands it requests. Between two steps of
the batch it drops rows whose client has gone, and reads the prompts of new ones, some at a time, so that a long queue
does not hold up the answers under way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.errors import AnswerFailed, Overloaded, RankwiseError, ServerStopping
from rankwise.serve.adapter_store import AdapterStore, ServedAdapter
from rankwise.serve.batch import Batch, joined, kept, prefill, step
from rankwise.serve.sampling import Sampling, TokenLogprobs, draw, token_logprobs
from rankwise.serve.text import TextStream
from rankwise.train.data.preflight import end_tokens

T = TypeVar("T")
log = logging.getLogger("rankwise")
_STOPPING = "the server is stopping: ask another one, or this one when it is back"
_PREFILL = 2048  # tokens, padding included, of prompts that are read between two steps


@dataclass(frozen=True)
class Piece:
    """One token of an answer.

    Attributes:
        text: what is settled with it; often nothing, or more than the token's own.
        finish_reason: "stop": the answer has ended; "length": it was cut off; None: there is more.
    """

    text: str
    token: int
    logprobs: TokenLogprobs | None
    finish_reason: Literal["stop", "length"] | None


@dataclass(eq=False)
class Generation:
    """An answer that is asked for.

    Attributes:
        prompt: token ids, one at least.
        adapter: None: the base model alone.
        deliver: called with each piece, in the engine's thread; or with an error, which is then the last.
        cancelled: nobody waits for it any more.
        asked: when, on the monotonic clock.
    """

    prompt: Sequence[int]
    sampling: Sampling
    adapter: ServedAdapter | None
    deliver: Callable[[Piece | RankwiseError], None]
    cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)


class Meter:
    """What is told of answers; this one counts nothing."""

    def first_token(self, generation: Generation, seconds: float) -> None:
        """A prompt has been read, so long after it was asked."""

    def ended(self, generation: Generation, outcome: str, tokens: int) -> None:
        """An answer of so many tokens ended: "stop", "length", "cancelled" or "error"."""


class _Row:
    """An answer under way."""

    def __init__(self, generation: Generation, tokenizer: PreTrainedTokenizerBase) -> None:
        self.generation = generation
        self.token = -1
        self.count = 0
        self.outcome: str | None = None
        self._text = TextStream(tokenizer, generation.sampling.stop)
        self._generator = generation.sampling.generator()

    @property
    def slot(self) -> str | None:
        return self.generation.adapter.slot if self.generation.adapter else None

    def advance(self, logits: Tensor, likeliest: int, ends: set[int]) -> Piece:
        """Choose the next token."""
        sampling = self.generation.sampling
        self.token = likeliest if sampling.temperature == 0 else draw(logits, sampling, self._generator)
        self.count += 1
        reported = None if sampling.logprobs is None else token_logprobs(logits, self.token, sampling.logprobs)
        ended = self.token in ends
        text = "" if ended else self._text.push(self.token)
        last = ended or self._text.stopped or self.count == sampling.max_tokens
        if not last:
            return Piece(text, self.token, reported, None)
        text += self._text.finish()
        reason: Literal["stop", "length"] = "stop" if ended or self._text.stopped else "length"
        self.outcome = reason
        return Piece(text, self.token, reported, reason)


class Engine:
    """Answers generations with a model, from a thread of its own.

    Args:
        max_batch: rows that are answered together.
        max_waiting: generations that may wait for a row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: AdapterStore,
        *,
        max_batch: int,
        max_waiting: int,
        meter: Meter | None = None,
    ) -> None:
        self.model, self.tokenizer, self.store = model.eval(), tokenizer, store
        self.max_batch, self.max_waiting, self.meter = max_batch, max_waiting, meter or Meter()
        self._ends = end_tokens(model, tokenizer)
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._rows: list[_Row] = []
        self._batch: Batch | None = None
        self._thread = threading.Thread(target=self._run, name="rankwise-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes generations."""
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> list[Generation]:
        """Those with a row."""
        return [row.generation for row in list(self._rows)]

    @property
    def waiting(self) -> list[Generation]:
        """Those that wait for one."""
        with self._changed:
            return list(self._waiting)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Take generations, all or none.

        Raises:
            Overloaded: too many wait. ServerStopping: the engine is closing.
        """
        with self._changed:
            if not self.alive:
                raise ServerStopping(_STOPPING)
            if len(self._waiting) + len(generations) > self.max_waiting:
                raise Overloaded(
                    f"{len(self._waiting)} requests wait already, of {self.max_waiting} that may: ask again later, or "
                    f"start the server with more --max-waiting"
                )
            self._waiting.extend(generations)
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two steps, in the thread that may change the model.

        Raises:
            ServerStopping: the engine is closing.
        """
        future: Future[T] = Future()
        with self._changed:
            if not self.alive:
                raise ServerStopping(_STOPPING)
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Stop after the step under way; what is not answered by then gets an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._next_turn():
                self._forget_cancelled()
                self._admit()
                self._advance()
        finally:  # nobody is left waiting, whatever it ended by
            with self._changed:
                self._closing = True
            stopped = ServerStopping(_STOPPING)
            for generation in [*self.running, *self.waiting]:
                generation.deliver(stopped)
            for _, future in self._calls:
                future.cancel()

    def _next_turn(self) -> bool:
        """Wait until there is something to do, and do what was called for; False: close."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._calls or self._rows or self._closing)
            if self._closing:
                return False
            calls = list(self._calls)
            self._calls.clear()
        for function, future in calls:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 (it is the caller's, who gets it)
                future.set_exception(error)
        return True

    def _admit(self) -> None:
        """Read the prompts of those that wait longest, as many as there is room for."""
        rows = [_Row(generation, self.tokenizer) for generation in self._admitted()]
        if not rows:
            return
        try:
            logits, batch = prefill(self.model, [row.generation.prompt for row in rows], [row.slot for row in rows])
            self._batch = batch if self._batch is None else joined(self._batch, batch)
        except Exception as error:  # noqa: BLE001 (a model's, of any kind; the others go on)
            self._fail(rows, error)
            return
        self._rows = [*self._rows, *rows]
        self._settle(rows, logits)

    def _admitted(self) -> list[Generation]:
        """Those whose turn it is, each with its adapter in memory. None overtakes another."""
        admitted: list[Generation] = []
        longest = 0
        while len(self._rows) + len(admitted) < self.max_batch and (head := self._head()) is not None:
            longest = max(longest, len(head.prompt))
            if admitted and longest * (len(admitted) + 1) > _PREFILL:
                break
            try:
                if head.adapter is not None and not self.store.acquire(head.adapter):
                    break
            except Exception as error:  # noqa: BLE001 (of files that anybody may have changed; the others go on)
                head.deliver(_told(error))
                self.meter.ended(head, "error", 0)
            else:
                admitted.append(head)
            with self._changed:
                self._waiting.popleft()
        return admitted

    def _head(self) -> Generation | None:
        with self._changed:
            return self._waiting[0] if self._waiting else None

    def _forget_cancelled(self) -> None:
        """Let go of what nobody waits for."""
        self._leave(lambda row: row.generation.cancelled, "cancelled")
        with self._changed:
            for generation in [generation for generation in self._waiting if generation.cancelled]:
                self._waiting.remove(generation)
                self.meter.ended(generation, "cancelled", 0)

    def _advance(self) -> None:
        """One more token for every row."""
        if self._batch is None:
            return
        try:
            logits = step(self.model, self._batch, [row.token for row in self._rows])
        except Exception as error:  # noqa: BLE001 (a model's, of any kind; those that come later go on)
            self._fail(self._rows, error)
            self._rows, self._batch = [], None
            return
        self._settle(self._rows, logits)

    def _settle(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Choose each row's next token, hand it out, and let go of those that have ended."""
        likeliest, sound = logits.argmax(-1).tolist(), logits.amax(-1).isfinite().tolist()
        for row, own, token, finite in zip(rows, logits, likeliest, sound, strict=True):
            try:
                if not finite:
                    raise ArithmeticError("its logits are not finite, as of an adapter that diverged")
                piece = row.advance(own, token, self._ends)
            except Exception as error:  # noqa: BLE001 (this row's, of any kind; the others go on)
                self._fail([row], error)
                continue
            if row.count == 1:
                self.meter.first_token(row.generation, time.monotonic() - row.generation.asked)
            row.generation.deliver(piece)
        self._leave(lambda row: row.outcome is not None, "")

    def _leave(self, leaves: Callable[[_Row], bool], outcome: str) -> None:
        """Take rows out of the batch."""
        leaving = [leaves(row) for row in self._rows]  # once: another thread may cancel meanwhile
        if not any(leaving):
            return
        for row, leave in zip(self._rows, leaving, strict=True):
            if leave and row.outcome != "error":
                self._let_go(row, row.outcome or outcome)
        stay = [index for index, leave in enumerate(leaving) if not leave]
        self._batch = kept(self._batch, stay) if stay and self._batch is not None else None
        self._rows = [self._rows[index] for index in stay]

    def _fail(self, rows: Sequence[_Row], error: Exception) -> None:
        """Tell those who wait for these rows, which are then no one's."""
        log.error("%d answers failed", len(rows), exc_info=error)
        for row in rows:
            row.outcome = "error"
            row.generation.deliver(_told(error))
            self._let_go(row, "error")

    def _let_go(self, row: _Row, outcome: str) -> None:
        if row.generation.adapter is not None:
            self.store.release(row.generation.adapter)
        self.meter.ended(row.generation, outcome, row.count)


def _told(error: Exception) -> RankwiseError:
    """An error as it is told to whom it concerns."""
    if isinstance(error, RankwiseError):
        return error
    return AnswerFailed(f"the model could not go on: {type(error).__name__}: {error}")
