"""From requests to prompts in tokens, within the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.errors import RequestError
from rankwise.serve.sampling import Sampling
from rankwise.serve.schema import ChatRequest, CompletionRequest
from rankwise.train.data.chat import Conversation
from rankwise.train.data.preflight import learned_positions
from rankwise.train.data.tokens import prompt_ids

_LENGTH = 4096


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        length: tokens of a prompt and its answer together.
        answer: tokens of an answer.
        choices: answers that one request may ask for.
        body: bytes of a request.
    """

    length: int
    answer: int
    choices: int
    body: int


def length_limit(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of a prompt and its answer: as asked, or 4096; never more than the model knows places for."""
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    known = min(places for places in (learned_positions(model), declared, asked or _LENGTH) if places)
    if asked is not None and known < asked:
        raise RequestError(f"--max-length: expected at most {known}, the positions that the model knows, found {asked}")
    return known


def prompts_of(request: CompletionRequest | ChatRequest, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompts of a request, in tokens.

    Raises:
        DataError: the chat template refuses the conversation, or there is none.
    """
    if isinstance(request, ChatRequest):
        messages = [message.plain() for message in request.messages]
        conversation = Conversation(messages, options=request.chat_template_kwargs, place="messages")
        return [prompt_ids(tokenizer, conversation)[1]]
    return [prompt_ids(tokenizer, prompt)[1] if isinstance(prompt, str) else prompt for prompt in request.prompts]


def check_prompts(prompts: Sequence[Sequence[int]], n: int, vocabulary: int, limits: Limits) -> None:
    """Refuse prompts that cannot be answered.

    Raises:
        RequestError: none or too many, an empty one, one that is too long, or a token that the model does not have.
    """
    if not 0 < len(prompts) * n <= limits.choices:
        raise RequestError(
            f"prompt: expected 1 to {limits.choices} answers to be asked for, found {len(prompts)} prompts × n = {n}"
        )
    for prompt in prompts:
        if not prompt:
            raise RequestError("prompt: expected some text to continue, found none")
        if len(prompt) >= limits.length:
            raise RequestError(
                f"prompt: expected fewer than {limits.length} tokens (prompt and answer together have at most so "
                f"many), found {len(prompt)}: shorten it, or start the server with more --max-length"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise RequestError(
                f"prompt: expected tokens from 0 to {vocabulary - 1}, found {min(prompt)}, {max(prompt)}"
            )


def sampling_of(
    request: CompletionRequest | ChatRequest, prompt: Sequence[int], choice: int, limits: Limits
) -> Sampling:
    """How one answer is chosen; of several, each draws with a seed of its own.

    Raises:
        RequestError: a longer answer is asked for than may be.
    """
    room = min(limits.answer, limits.length - len(prompt))
    asked = request.answer_limit
    if asked is not None and asked > room:
        raise RequestError(
            f"max_tokens: expected at most {room} after a prompt of {len(prompt)} tokens, found {asked}: ask for less, "
            f"or start the server with more --max-tokens or --max-length"
        )
    return Sampling(
        max_tokens=asked or room,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(request.top_k, 0),
        seed=None if request.seed is None else (request.seed + choice) % 2**63,
        stop=request.stops,
        logprobs=request.alternatives,
    )
