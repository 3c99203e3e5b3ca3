"""An adapted model trains like any other: a bare loop, transformers' Trainer, TRL, gradient checkpointing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from zoo import base_bytes, fingerprint, perturb, relative

import rankwise as rw
from rankwise.inits import INITS
from rankwise.variants import VARIANTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning"),
]

SPECS = {
    "kaiming": rw.LoRA(rank=2, alpha=8),
    "lora-ga": rw.LoRA(rank=2, alpha=8, init="lora-ga", scaling="rslora", dropout=0.1),
}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(2, 32, (4, 10), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def attached(name: str, model: nn.Module | None = None) -> nn.Module:
    return rw.attach(model or llama(), SPECS[name], batches=[batch()])


def loss_of(model: nn.Module) -> float:
    was = model.training
    with torch.no_grad():
        loss = float(model.eval()(**batch()).loss)
    model.train(was)
    return loss


@pytest.mark.parametrize("name", SPECS)
def test_a_bare_loop(name: str):
    pretrained = llama().train()
    model = attached(name, llama().train())
    before = loss_of(model)
    assert before == pytest.approx(loss_of(pretrained))
    optimizer = torch.optim.AdamW(rw.trainable_parameters(model), lr=3e-2)
    for _ in range(15):
        model(**batch()).loss.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if ".rankwise." not in n)
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model) < before - 0.1
    assert base_bytes(model) == base_bytes(pretrained)
    rw.detach(model)
    assert fingerprint(model) == fingerprint(pretrained)


@pytest.mark.parametrize(
    ("init", "variant"),
    [(init, name) for name, method in VARIANTS.items() for init in (INITS if method.cls.takes_start else ["kaiming"])],
)
def test_every_method_learns(init: str, variant: str):
    """A few steps of plain gradient descent lower the loss, with nothing tuned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    x = torch.randn(64, 8)
    target = torch.randn(64, 8)

    def loss(model: nn.Module, inputs: Tensor) -> Tensor:
        return (model(inputs) - target).square().mean()

    original = {n: w + 0.05 * torch.randn_like(w) for n, w in rw.weights(model).items()}
    needs_weights = INITS[init].cls.needs == "weights"
    rw.attach(
        model, rw.LoRA(rank=2, init=init, variant=variant), batches=[x], loss=loss,
        evidence=original if needs_weights else None,
    )  # fmt: skip
    optimizer = torch.optim.Adam(rw.trainable_parameters(model), lr=1e-2)
    values = []
    for _ in range(30):
        value = loss(model, x)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(value.detach()))
    assert values[-1] < 0.97 * values[0], values[:: len(values) // 5]


def _rows() -> Dataset:
    ids = [row.tolist() for seed in range(4) for row in batch(seed)["input_ids"]]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]})


def _arguments(cls: Any, where: Path, **fields: Any) -> Any:
    return cls(
        output_dir=str(where), max_steps=6, per_device_train_batch_size=4, learning_rate=3e-2, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, seed=0, **fields,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", SPECS)
def test_transformers_trainer(name: str, checkpointing: bool, tmp_path: Path):
    model = attached(name)
    before = loss_of(model)
    fields: dict[str, Any] = {"gradient_checkpointing": True} if checkpointing else {}
    trainer = Trainer(model, _arguments(TrainingArguments, tmp_path, **fields), train_dataset=_rows())
    trainer.train()
    assert loss_of(model) < before - 0.02
    assert base_bytes(model) == base_bytes(llama())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in rw.trainable_parameters(model)}
    rw.save(model, tmp_path / "adapter")
    again = rw.load(llama(), tmp_path / "adapter")
    assert loss_of(again) == pytest.approx(loss_of(model), abs=1e-5)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 32)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_trl_sft_trainer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    model = attached("lora-ga")
    rows = [{"text": " ".join(f"w{i}" for i in row)} for row in batch()["input_ids"].tolist()] * 2
    arguments = _arguments(SFTConfig, tmp_path, max_length=16, bf16=False)
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    before = loss_of(model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert loss_of(trainer.model) < before
    assert base_bytes(model) == base_bytes(llama())
    assert all(p.requires_grad for pair in rw.pairs(model) for p in pair.parameters)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_gradient_checkpointing_of_transformers(name: str, reentrant: bool):
    """The same gradients with and without, dropout included."""
    gradients = []
    for checkpointing in (False, True):
        model = attached(name).train()
        perturb(model, 0.1)
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(4)
        model(**batch()).loss.backward()
        gradients.append([p.grad for p in rw.trainable_parameters(model)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any()
        assert relative(checkpointed, plain) < 1e-5


def test_bf16_weights_train_fp32_adapters():
    model = attached("lora-ga", llama(torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in rw.trainable_parameters(model))
    before = loss_of(model)
    optimizer = torch.optim.AdamW(rw.trainable_parameters(model), lr=3e-2)
    for _ in range(10):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model) < before - 0.05
