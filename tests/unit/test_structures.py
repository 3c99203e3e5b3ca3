"""Adapters on other structures: an encoder with a new head, an encoder–decoder, a ViT, a grouped convnet."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import rankwise as rw

INITS = ["kaiming", "pissa", "lora-ga", "eva"]
Batch = dict[str, Tensor]


def _encoder() -> nn.Module:
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def _texts() -> Batch:
    mask = torch.ones(6, 7, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(0, 30, (6, 7)), "attention_mask": mask, "labels": torch.arange(6) % 3}


def _encoder_decoder() -> nn.Module:
    config = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, dropout_rate=0.1
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def _translations() -> Batch:
    texts = _texts()
    return texts | {"labels": torch.randint(1, 30, (6, 5))}


def _vit() -> nn.Module:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def _pictures() -> Batch:
    return {"pixel_values": torch.randn(6, 3, 8, 8), "labels": torch.arange(6) % 3}


class GroupedConvnet(nn.Module):
    """A ResNeXt-like stack: convolutions with 2 groups, with one group a channel, and with none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(12, 8, 1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(2, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SimpleNamespace:
        h = self.stem(pixel_values).relu()
        h = h + self.pointwise(self.grouped(h).relu())
        h = self.norm(self.depthwise(h)).relu()
        logits = self.classifier(h.mean((2, 3)))
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


@dataclass(frozen=True)
class Structure:
    """A tiny model, a batch for it, and where its adapter goes."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    head: tuple[str, ...] = ()

    def build(self) -> tuple[nn.Module, Batch]:
        torch.manual_seed(0)
        return self.make().eval(), self.batch()

    def targets(self, model: nn.Module) -> list[str]:
        """Every linear layer and convolution but the head."""
        heads = (*self.head, "lm_head")
        return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n not in heads]

    def spec(self, model: nn.Module, init: str, **options: Any) -> rw.LoRA:
        targets = self.targets(model)
        return rw.LoRA(rank=2, alpha=4, init=init, target_modules=targets, modules_to_save=self.head, **options)


STRUCTURES = {
    "encoder": Structure(_encoder, _texts, ("classifier",)),
    "encoder-decoder": Structure(_encoder_decoder, _translations),
    "vit": Structure(_vit, _pictures, ("classifier",)),
    "convnet": Structure(GroupedConvnet, _pictures, ("classifier",)),
}


@pytest.fixture(params=STRUCTURES)
def structure(request: pytest.FixtureRequest) -> Structure:
    return STRUCTURES[request.param]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def loss(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


def train(model: nn.Module, batch: Batch, steps: int = 6) -> None:
    optimizer = torch.optim.Adam(rw.trainable_parameters(model), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_the_laws(structure: Structure, init: str, tmp_path: Path) -> None:
    model, batch = structure.build()
    fresh, clean = deepcopy(model), {key: value.clone() for key, value in model.state_dict().items()}
    pretrained, before = logits(model, batch), loss(model, batch)

    rw.attach(model, structure.spec(model, init), batches=[batch])
    assert init == "eva" or [pair.name for pair in rw.pairs(model)] == structure.targets(fresh)
    assert torch.equal(logits(model, batch), pretrained)

    train(model, batch)
    adapted = logits(model, batch)
    assert loss(model, batch) < before - 0.01

    rw.save(model, tmp_path)
    close(logits(rw.load(fresh, tmp_path), batch), adapted)
    with rw.disabled(model):
        assert torch.equal(logits(model, batch), pretrained)
    rw.merge(model)
    close(logits(model, batch), adapted)

    kept = rw.detach(model).state_dict()
    assert kept.keys() == clean.keys()
    assert all(torch.equal(kept[key], value) for key, value in clean.items())
    assert torch.equal(logits(model, batch), pretrained)


def test_the_gradients_are_autograds(structure: Structure) -> None:
    """Through encoder, cross attention and decoder; of every patch; of every group."""
    model, batch = structure.build()
    found = rw.gradients(model, [batch], structure.targets(model))
    model(**batch).loss.backward()
    assert list(found) == structure.targets(model)
    for name, evidence in found.items():
        expected = model.get_submodule(name).weight.grad.flatten(1)
        torch.testing.assert_close(evidence.matrix, expected, atol=1e-7, rtol=1e-4, msg=name)


def test_a_sketch_as_wide_as_the_gradient_is_the_gradient(structure: Structure) -> None:
    model, batch = structure.build()
    targets = structure.targets(model)
    exact = rw.gradients(model, [batch], targets)
    found = rw.gradients(model, [batch], targets, "sketch", rank=max(min(each.matrix.shape) for each in exact.values()))
    for name, truth in exact.items():
        G, each = truth.matrix, found[name]
        gap = ((each.U * each.S) @ each.V.T - G).norm() / G.norm()
        assert float(gap) < 1e-3, (
            name,
            float(gap),
        )  # directions below 1e-4 of the largest are left out: 1e-6 of the energy


def test_all_linear_takes_the_body_and_leaves_the_heads() -> None:
    def names(key: str) -> list[str]:
        model, _ = STRUCTURES[key].build()
        return [site.name for site in rw.plan(model, rw.LoRA(rank=2, modules_to_save=STRUCTURES[key].head))]

    assert "bert.pooler.dense" in names("encoder") and "classifier" not in names("encoder")
    assert "decoder.block.1.layer.1.EncDecAttention.k" in names("encoder-decoder")
    assert "lm_head" not in names("encoder-decoder")


def test_what_is_padding_to_the_encoder_counts_nowhere() -> None:
    """Neither in the loss, nor in a gradient, nor in what the encoder and cross attention are fed."""
    structure = STRUCTURES["encoder-decoder"]
    model, batch = structure.build()
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 4:] = 7
    for collect in (rw.gradients, rw.covariances):
        first, second = (collect(model, [b], structure.targets(model)) for b in (batch, other))
        for name in first:
            torch.testing.assert_close(first[name].matrix, second[name].matrix, atol=1e-6, rtol=1e-4, msg=name)
    real, all_places = int(batch["attention_mask"].sum()), batch["labels"].numel()
    counts = {name: evidence.count for name, evidence in rw.covariances(model, [batch]).items()}
    assert counts["encoder.block.0.layer.0.SelfAttention.q"] == real
    assert counts["decoder.block.0.layer.1.EncDecAttention.k"] == real
    assert counts["decoder.block.0.layer.1.EncDecAttention.q"] == all_places


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("key", ["encoder", "encoder-decoder", "vit"])
def test_peft_reads_what_we_write(key: str, tmp_path: Path) -> None:
    structure = STRUCTURES[key]
    model, batch = structure.build()
    base = deepcopy(model)
    rw.attach(model, structure.spec(model, "lora-ga"), batches=[batch])
    train(model, batch)
    rw.save(model, tmp_path)
    close(logits(PeftModel.from_pretrained(base, str(tmp_path)), batch), logits(model, batch))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_we_read_what_peft_writes_for_sequence_classification(tmp_path: Path) -> None:
    structure = STRUCTURES["encoder"]
    model, batch = structure.build()
    base = deepcopy(model)
    theirs = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "dense"]))
    train(theirs, batch)
    theirs.save_pretrained(tmp_path)
    close(logits(rw.load(base, tmp_path), batch), logits(theirs, batch))


def test_a_new_head_under_transformers_trainer(tmp_path: Path) -> None:
    structure = STRUCTURES["encoder"]
    model, batch = structure.build()
    fresh, original = deepcopy(model), model.classifier.weight.detach().clone()
    rw.attach(model, structure.spec(model, "lora-ga", dropout=0.1), batches=[batch])
    rows = Dataset.from_dict({key: value.tolist() for key, value in batch.items()})
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=args, train_dataset=rows).train()
    assert not torch.equal(model.classifier.weight, original)
    rw.save(model, tmp_path / "adapter")
    close(logits(rw.load(fresh, tmp_path / "adapter"), batch), logits(model, batch))
    assert torch.equal(rw.detach(model).classifier.weight, original)
