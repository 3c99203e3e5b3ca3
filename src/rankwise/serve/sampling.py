"""How the next token of an answer is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.shapes import Float


@dataclass(frozen=True)
class Sampling:
    """What a request says of its answer.

    Attributes:
        max_tokens: longest answer.
        temperature: what the logits are divided by; 0: always the likeliest token.
        top_p: draw from the fewest tokens that are this likely together.
        top_k: draw from so many tokens; 0: from all.
        seed: of the draws; None: another one each time.
        stop: texts that end the answer, and do not belong to it.
        logprobs: how many of the likeliest tokens to report at each place; None: report nothing.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def generator(self) -> torch.Generator:
        """What the draws of one answer are made with."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class TokenLogprobs:
    """The logarithm of a chosen token's probability, before temperature, and the likeliest tokens' (token, it)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def probabilities(logits: Float[Tensor, "vocabulary"], sampling: Sampling) -> Float[Tensor, "vocabulary"]:
    """What a token is drawn from, for a temperature above 0: temperature first, then top_k, then top_p."""
    logits = logits.double()
    scaled = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        least = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    chances = scaled.softmax(0)
    if sampling.top_p < 1:
        ordered, order = chances.sort(descending=True, stable=True)
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0  # the likeliest stays always
        chances = torch.zeros_like(chances).scatter(0, order, ordered)
    return chances / chances.sum()


def draw(logits: Float[Tensor, "vocabulary"], sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of an answer."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits.cpu(), sampling), 1, generator=generator))


def token_logprobs(logits: Float[Tensor, "vocabulary"], token: int, count: int) -> TokenLogprobs:
    """What is reported of a chosen token, with ``count`` of the likeliest."""
    logprobs = logits.float().log_softmax(0)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprobs(float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
