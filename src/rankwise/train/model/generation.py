"""Text from a model, before and after its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise as rw
from rankwise.errors import DataError, UnsupportedAdapter
from rankwise.train.data.chat import Conversation
from rankwise.train.data.labels import read_labels
from rankwise.train.data.preflight import learned_positions
from rankwise.train.data.tokens import Prompt, prompt_ids
from rankwise.train.data.trained_on import trained_on_chats
from rankwise.train.model.merged import base_of
from rankwise.train.model.pretrained import load_pretrained


@dataclass(frozen=True)
class Sample:
    """A prompt, what the pretrained model makes of it, and what the adapted one does."""

    prompt: str
    before: str
    after: str
    reference: str | None = None


def before_and_after(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_new_tokens: int = 64
) -> Sample:
    """Greedy answers without and with the adapter; a conversation goes through the chat template.

    Raises:
        DataError: no prompt, one that the chat template refuses, or one that leaves the model no room to answer.
    """
    text, ids = prompt_ids(tokenizer, prompt)
    if model.config.is_encoder_decoder:
        ids = tokenizer(text)["input_ids"]  # with the end token that encoders are used to
    if not text:
        raise DataError("prompt: expected some text to continue, found none")
    positions = learned_positions(model)
    if positions is not None and len(ids) >= positions:
        raise DataError(
            f"prompt: expected fewer than {positions} tokens, the positions that the model has learned, found "
            f"{len(ids)}. Shorten it."
        )
    max_new_tokens = max_new_tokens if positions is None else min(max_new_tokens, positions - len(ids))
    with rw.disabled(model):
        before = generate(model, tokenizer, ids, max_new_tokens)
    return Sample(text, before, generate(model, tokenizer, ids, max_new_tokens))


def answer(
    adapter: Path, base: str | None, prompt: str, *, chat: bool | None = None, max_new_tokens: int = 64
) -> Sample:
    """Load a saved adapter on its base model (or on `base`) and answer a prompt without and with it.

    Args:
        chat: whether the prompt goes through the chat template; None: if the adapter was trained on chats.
    """
    refuse_classifier(adapter)
    chat = trained_on_chats(adapter) if chat is None else chat
    model, tokenizer = load_pretrained(base or base_of(adapter))
    rw.load(model, adapter)
    asked = Conversation([{"role": "user", "content": prompt}]) if chat else prompt
    return before_and_after(model, tokenizer, asked, max_new_tokens)


def refuse_classifier(adapter: Path) -> None:
    """A classifier writes no text.

    Raises:
        UnsupportedAdapter: the adapter is one's.
    """
    if (labels := read_labels(adapter)) is not None:
        raise UnsupportedAdapter(
            f"{adapter}: expected the adapter of a language model, found a classifier's ({', '.join(labels)}), which "
            "writes no text. Fold it with `rankwise merge` and use the model with transformers' text-classification "
            "pipeline."
        )


def _length(model: PreTrainedModel, count: int) -> dict[str, int]:
    """How much is written, in the words that a model's own configuration has for it."""
    return {"max_length": count + 1} if model.config.is_encoder_decoder else {"max_new_tokens": count}


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], max_new_tokens: int = 64
) -> str:
    """Continue a prompt's tokens greedily: the same answer every time."""
    training = model.training
    model.eval()
    try:
        inputs = torch.tensor([ids], device=model.device)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            **_length(model, max_new_tokens),
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
    finally:
        model.train(training)
    answer = output[0] if model.config.is_encoder_decoder else output[0, len(ids) :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
