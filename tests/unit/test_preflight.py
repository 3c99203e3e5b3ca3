"""What a model has no row or no place for is named before a step is taken."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_llama import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

import rankwise as rw
from rankwise.errors import DataError
from rankwise.train.data.preflight import check_fits, learned_positions, numbered
from rankwise.train.data.tokens import ROW
from rankwise.train.model.generation import before_and_after

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
GPT_2 = GPT2Config(vocab_size=260, n_positions=16, n_embd=8, n_layer=1, n_head=1)
FAMILIES: dict[str, tuple[Any, int | None]] = {
    "GPT-2": (GPT_2, 16),
    "GPT-Neo": (
        GPTNeoConfig(vocab_size=260, max_position_embeddings=16, hidden_size=8, num_layers=1, num_heads=1,
                     attention_types=[[["global"], 1]]),
        16,
    ),
    "OPT": (
        OPTConfig(vocab_size=260, max_position_embeddings=16, hidden_size=8, ffn_dim=8, num_hidden_layers=1,
                  num_attention_heads=1, word_embed_proj_dim=8),
        16,
    ),
    "Llama": (LlamaConfig(vocab_size=260, max_position_embeddings=16, **SMALL), None),
    "BERT": (BertConfig(vocab_size=260, max_position_embeddings=16, **SMALL), 16),
    "RoBERTa": (RobertaConfig(vocab_size=260, max_position_embeddings=18, pad_token_id=1, **SMALL), 16),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_positions_are_as_many_as_a_model_can_take(family: str) -> None:
    """So many tokens it takes, and one more it does not."""
    config, positions = FAMILIES[family]
    kind = AutoModelForSequenceClassification if family in ("BERT", "RoBERTa") else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    assert learned_positions(model) == positions
    model(torch.full((1, positions or 64), 5))
    if positions is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, positions + 1), 5))


def samples(*rows: list[int]) -> Iterable[tuple[int, list[int]]]:
    places = [3 * number for number in range(1, len(rows) + 1)]
    return numbered(Dataset.from_dict({"input_ids": list(rows), ROW: places}))


def test_a_token_beyond_the_embedding_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    config = LlamaConfig(vocab_size=len(tokenizer) - 1, **SMALL)
    model = AutoModelForCausalLM.from_config(config)
    check_fits(samples([config.vocab_size - 1]), "training", model, tokenizer)
    with pytest.raises(DataError, match=rf"training sample 6: .*\({config.vocab_size} rows\), found '<new>', number"):
        check_fits(samples([5], [5, config.vocab_size]), "training", model, tokenizer)
    tokenizer.pad_token = "<new>"
    with pytest.raises(DataError, match="expected a pad_token with a row"):
        check_fits(samples([5]), "training", model, tokenizer)


def test_a_sample_longer_than_the_learned_positions_is_named() -> None:
    model, tokenizer = AutoModelForCausalLM.from_config(GPT_2), tiny_tokenizer()
    check_fits(samples([5] * 16), "training", model, tokenizer)
    with pytest.raises(
        DataError, match=r"held-out sample 3: expected at most 16 tokens.*found 17\. Set max_length: 16"
    ):
        check_fits(samples([5] * 17), "held-out", model, tokenizer)
    llama = AutoModelForCausalLM.from_config(FAMILIES["Llama"][0])
    check_fits(samples([5] * 64), "training", llama, tokenizer)


def test_an_answer_ends_where_the_positions_do() -> None:
    model, tokenizer = AutoModelForCausalLM.from_config(GPT_2), tiny_tokenizer()
    rw.attach(model, rw.LoRA(rank=2))
    sample = before_and_after(model, tokenizer, "a" * 14)
    assert len(tokenizer(sample.after)["input_ids"]) <= 2
    with pytest.raises(DataError, match="expected fewer than 16 tokens, the positions that the model has learned"):
        before_and_after(model, tokenizer, "a" * 16)
