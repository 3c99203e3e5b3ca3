"""`rankwise chat`: a conversation in the terminal, with adapters to switch between, or all beside the base."""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rankwise.errors import RankwiseError, RequestError
from rankwise.methods import nearest
from rankwise.serve.adapter_store import check_directory, named_directories
from rankwise.serve.api import Service
from rankwise.serve.engine import Generation, Piece
from rankwise.serve.options import ServerOptions
from rankwise.serve.prompts import check_prompts
from rankwise.serve.sampling import Sampling
from rankwise.serve.server import make_service
from rankwise.train.data.chat import Conversation
from rankwise.train.data.messages import Message
from rankwise.train.data.tokens import prompt_ids
from rankwise.train.model.busy import busy
from rankwise.train.model.merged import base_of
from rankwise.train.model.pretrained import load_pretrained

_HELP = """\
/adapter NAME   answer with this adapter
/base           answer with the base model alone
/beside         answer with both, one after the other; again: only with one
/system TEXT    another system message, and a new conversation
/reset          a new conversation
/help           this
/quit           leave, as the end of the input does"""


def chat(
    directories: Sequence[str], base: str | None, system: str | None, sampling: Sampling, console: Console
) -> None:
    """Talk to adapters until ``/quit`` or the end of the input.

    Raises:
        RequestError: no such directory. What ``rankwise.load`` raises of one that does not fit.
    """
    adapters = dict(named_directories(directories))
    base = base or base_of(next(iter(adapters.values())))
    with busy(console, f"Loading {base}"):
        model, tokenizer = load_pretrained(base)
        options = ServerOptions(max_adapters=len(adapters), max_tokens=sampling.max_tokens)
        service = make_service(model, tokenizer, base, options)
        for name, directory in adapters.items():
            _add(service, name, directory)
    try:
        Chat(service, next(iter(adapters)), sampling, console, system).run(_lines())
    finally:
        service.engine.close()


def _add(service: Service, name: str, directory: Path) -> None:
    check_directory(directory)
    service.engine.call(lambda: service.engine.store.add(name, directory)).result()


def _lines() -> Iterator[str]:
    """What is typed, line by line; or what is piped in."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 (gives input() its history)

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return


@dataclass
class Chat:
    """A conversation under way.

    Attributes:
        name: the model that answers.
        beside: whether the base answers too; what it says does not become part of the conversation.
    """

    service: Service
    name: str
    sampling: Sampling
    console: Console
    system: str | None = None
    beside: bool = False
    messages: list[Message] = field(default_factory=list)

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line, or do what it says after a slash."""
        commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._choose,
            "/base": lambda _: self._choose(self.service.engine.store.base),
            "/beside": self._toggle_beside,
            "/system": self._set_system,
            "/reset": lambda _: self._reset(),
            "/help": lambda _: self._say(_HELP),
        }
        for line in map(str.strip, lines):
            word, _, rest = line.partition(" ")
            try:
                if word == "/quit":
                    return
                if word in commands:
                    commands[word](rest.strip())
                elif word.startswith("/"):
                    raise RequestError(f"no command {word}{nearest(word, [*commands, '/quit'])}; /help lists them")
                elif line:
                    self._answer(line)
            except RankwiseError as error:
                self._say(f"{type(error).__name__}: {error}", "red")

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        store = self.service.engine.store
        names = [store.base, self.name] if self.beside and self.name != store.base else [self.name]
        answers = self._asked(messages, names)
        try:
            for name, pieces in answers.items():
                if len(answers) > 1:
                    self._say(f"[{name}]", "bold")
                answer = self._shown(pieces)
        except KeyboardInterrupt:
            self._say("(stopped)", "yellow")
            return
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _asked(self, messages: list[Message], names: Sequence[str]) -> dict[str, Iterator[str]]:
        """Ask all models at once; model name → the pieces of its answer."""
        engine, limits = self.service.engine, self.service.limits
        start = [{"role": "system", "content": self.system}] if self.system else []
        _, prompt = prompt_ids(engine.tokenizer, Conversation([*start, *messages], place="the conversation"))
        check_prompts([prompt], 1, len(engine.tokenizer), limits)
        queues: list[queue.Queue[Piece | RankwiseError]] = [queue.Queue() for _ in names]
        generations = [
            Generation(prompt, self.sampling, engine.store.find(name), answers.put)
            for name, answers in zip(names, queues, strict=True)
        ]
        engine.submit(generations)
        return {
            name: _pieces(answers, generation)
            for name, answers, generation in zip(names, queues, generations, strict=True)
        }

    def _shown(self, pieces: Iterator[str]) -> str:
        answer = ""
        for piece in pieces:
            self.console.print(Text(piece), end="", soft_wrap=True)
            answer += piece
        self.console.print()
        return answer

    def _choose(self, name: str) -> None:
        self.service.engine.store.find(name)
        self.name = name

    def _toggle_beside(self, _: str) -> None:
        self.beside = not self.beside

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._reset()

    def _reset(self) -> None:
        self.messages = []

    def _say(self, text: str, style: str = "dim") -> None:
        self.console.print(text, style=style, highlight=False)


def _pieces(events: queue.Queue[Piece | RankwiseError], generation: Generation) -> Iterator[str]:
    """The pieces of an answer as they come; it is cancelled when nobody asks for the next."""
    try:
        while True:
            event = events.get()
            if isinstance(event, RankwiseError):
                raise event
            yield event.text
            if event.finish_reason is not None:
                return
    finally:
        generation.cancelled = True
