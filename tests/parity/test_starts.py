"""EVA and CorDA beside PEFT's own preparation of the same model on the same batches."""

import dataclasses
import importlib
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

import rankwise as rw
from rankwise.evidence import InputCovariance

TARGETS = ["q", "k", "out"]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.q, self.k = nn.Linear(12, 16), nn.Linear(12, 16)
        self.out = nn.Linear(16, 14)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.out(torch.tanh(self.q(x)) * self.k(x))


def make() -> tuple[Tiny, list[dict[str, Tensor]]]:
    model = Tiny()
    with torch.no_grad():
        model.embed.weight.mul_(0.55 ** torch.arange(12.0))  # clear gaps, so that directions are well defined
    lengths = torch.randint(3, 9, (6, 8, 1))
    masks = (torch.arange(8) < lengths).long()
    return model, [{"input_ids": torch.randint(50, (8, 8)), "attention_mask": m} for m in masks]


def test_eva_finds_pefts_directions_and_ranks() -> None:
    model, batches = make()
    eva = EvaConfig(rho=2.0, tau=0.99999)  # with a lower one it stops before it has seen all batches
    config = LoraConfig(r=3, init_lora_weights="eva", target_modules=TARGETS, eva_config=eva)
    theirs = get_eva_state_dict(model, batches, config, show_progress_bar=False)
    rw.attach(model, rw.LoRA(rank=3, init="eva", target_modules=TARGETS), batches=batches)
    ours = {pair.name: pair.A.detach() for pair in rw.pairs(model)}
    assert {name: len(A) for name, A in ours.items()} == {name: len(A) for name, A in theirs.items() if len(A)}
    for name, A in ours.items():
        V = theirs[name].float()
        cosines = torch.linalg.svdvals(A @ V.T)  # of the angles between the two subspaces
        assert cosines.min() > 0.99, name
        assert (A[0] @ V[0]).abs() > 0.999, name


@pytest.fixture
def preprocess_corda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT's; it takes ``dataclass`` from attrs, which it does not declare and which is not installed here."""
    monkeypatch.setitem(sys.modules, "attr", dataclasses)
    return importlib.import_module("peft.tuners.lora.corda").preprocess_corda


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_gives_pefts_product(mode: Any, preprocess_corda: Any) -> None:
    model, batches = make()
    for batch in batches:
        del batch["attention_mask"]  # PEFT's covariance counts padding in
    batches = [{"input_ids": row[None]} for batch in batches for row in batch["input_ids"]]
    theirs = deepcopy(model)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        init_lora_weights="corda",
        target_modules=TARGETS,
        corda_config=CordaConfig(corda_method=mode),
    )
    covariance: dict[str, Tensor] = {}

    def run() -> None:
        for batch in batches:
            theirs(**batch)
        for name in TARGETS:  # PEFT scales every batch by its own largest value; take what it found as evidence
            layer: Any = theirs.get_submodule(name)
            covariance[name] = layer.covariance_matrix.clone()

    preprocess_corda(theirs, config, run_model=run)
    theirs = get_peft_model(theirs, config)
    evidence = {name: InputCovariance(matrix, 1) for name, matrix in covariance.items()}
    init = rw.inits.Corda(mode=mode)
    rw.attach(model, rw.LoRA(rank=3, alpha=6, init=init, target_modules=TARGETS), evidence=evidence)
    for pair in rw.pairs(model):
        layer = theirs.base_model.model.get_submodule(pair.name)
        expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        torch.testing.assert_close(pair.scale * pair.B @ pair.A, expected, atol=1e-4, rtol=1e-3)
