"""Rows that are continued together say what each says alone: whoever joins and leaves, in every kind of attention."""

import random

import pytest
import torch
from served import save_adapter
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import rankwise as rw
from rankwise.errors import PretrainedError
from rankwise.serve.batch import Batch, check_generates, joined, kept, prefill, step

VOCABULARY = 50
SMALL = {"vocab_size": VOCABULARY, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "rope": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **LLAMA, num_hidden_layers=2)),
    "learned positions": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "alibi": lambda: BloomForCausalLM(BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4)),
    "sliding window": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, **LLAMA, head_dim=8, num_hidden_layers=2, sliding_window=6)
    ),
}


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    """A model with four adapters loaded, one of them DoRA."""
    model = MODELS[request.param]().eval()
    for seed, variant in enumerate(("lora", "dora", "lora", "lora")):
        save_adapter(model, tmp_path / str(seed), seed, variant=variant, size=0.2, target_modules="all-linear")
    for seed in range(4):
        rw.load(model, tmp_path / str(seed), name=f"a{seed}")
    return model


def logits_alone(model, ids: list[int], adapter: str | None) -> torch.Tensor:
    """The next token's logits, without a cache, padding or company."""
    if adapter is None:
        with rw.disabled(model), torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1]
    rw.activate(model, adapter)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def prompt(draws: random.Random) -> list[int]:
    return [draws.randrange(1, VOCABULARY) for _ in range(draws.randint(1, 12))]


@pytest.mark.parametrize("seed", range(2))
def test_rows_join_and_leave_without_a_trace(model, seed):
    draws = random.Random(seed)
    texts: list[list[int]] = []
    batch: Batch | None = None
    for turn in range(8):
        if batch is None or turn % 3 == 0:
            new = [prompt(draws) for _ in range(draws.randint(1, 3))]
            adapters = [draws.choice([None, "a0", "a1", "a2", "a3"]) for _ in new]
            logits, others = prefill(model, new, adapters)
            batch = others if batch is None else joined(batch, others)
            texts += new
            check(model, new, adapters, logits)
        tokens = [draws.randrange(1, VOCABULARY) for _ in texts]
        logits = step(model, batch, tokens)
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        check(model, texts, batch.adapters, logits)
        stay = sorted(draws.sample(range(len(texts)), draws.randint(1, len(texts))))
        batch, texts = kept(batch, stay), [texts[row] for row in stay]
        assert batch.mask.shape[1] == max(map(len, texts)), "padding that all rows have is dropped"


def check(model, texts, adapters, logits):
    expected = torch.stack([logits_alone(model, text, adapter) for text, adapter in zip(texts, adapters, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_adapters_say_different_things(model):
    """Without which the test above would show nothing."""
    said = [logits_alone(model, [3, 1, 4, 1, 5], name) for name in (None, "a0", "a1", "a2", "a3")]
    gaps = [float((one - other).abs().max()) for i, one in enumerate(said) for other in said[:i]]
    assert min(gaps) > 1e-2


def test_a_model_with_a_state_is_refused():
    model = MambaForCausalLM(MambaConfig(**SMALL, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(PretrainedError, match="Mamba"):
        check_generates(model)
    check_generates(MODELS["sliding window"]())
