"""AdaLoRA: the layer, the allocator against a literal transcription of the paper, the trainer's callback, the files."""

import json
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import rankwise as rw
from rankwise.errors import AttachError, MissingTensor, SpecError, TrainingError
from rankwise.format.state import load_state, save_state
from rankwise.optim import RankAllocator
from rankwise.train.trainer.variant_callback import VariantCallback
from rankwise.variants import AdaLora
from rankwise.variants.rank_allocator import adalora_layers, cubic_budget, most_important

RANK, SITES = 4, 3


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12))


def adapted(**options: Any) -> nn.Module:
    return rw.attach(network(), rw.LoRA(rank=RANK, alpha=8, variant=AdaLora(**options)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 16, generator=generator)
    return x, x[:, :12].roll(1, 0)


def run(model: nn.Module, first: int, last: int, total: int, optimizer: Any = None) -> Any:
    """A bare loop, as in the documentation."""
    allocator = RankAllocator(model, total)
    optimizer = optimizer or torch.optim.AdamW(rw.trainable_parameters(model), lr=1e-2)
    for step in range(first, last + 1):
        x, target = batch(step)
        ((model(x) - target).square().mean() + allocator.penalty()).backward()
        allocator.step(step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_start_is_the_papers() -> None:
    model, x = adapted(), batch(0)[0]
    assert torch.equal(model(x), network()(x))
    for layer in adalora_layers(model):
        assert layer.lora_A.shape[0] == 6 and layer.target_rank == RANK  # 1.5 × 4
        assert layer.scale == 8 / RANK
        assert not layer.lora_E.any()
        for factor in (layer.lora_A, layer.lora_B):
            assert 0.015 < float(factor.detach().std()) < 0.025
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*(layer.lora_A[:, :12] for layer in adalora_layers(model)[:2]))


def test_the_initial_rank_fits_a_small_layer() -> None:
    model = rw.attach(nn.Sequential(nn.Linear(5, 9)), rw.LoRA(rank=4, variant="adalora", target_modules=["0"]))
    (layer,) = adalora_layers(model)
    assert (layer.lora_A.shape[0], layer.target_rank) == (5, 4)


def test_the_cubic_budget_starts_and_ends_where_it_should() -> None:
    budgets = [cubic_budget(t, 36, 24, 10, 100, 30) for t in range(101)]
    assert budgets[:11] == [36] * 11
    assert budgets[70:] == [24] * 31
    assert budgets[69] == 24 and budgets[11] < 36
    assert all(a >= b for a, b in pairwise(budgets))
    assert budgets[40] == 24 + int(12 * 0.5**3)


def literal_scores(history: list[dict[str, tuple[Tensor, Tensor]]], beta1: float, beta2: float) -> list[float]:
    """Equations 8–11 and the triplet's score, entry by entry; history: step → factor name → (weight, gradient)."""
    smoothed: dict[tuple[str, int, int], float] = {}
    uncertain: dict[tuple[str, int, int], float] = {}
    for step in history:
        for name, (weight, gradient) in step.items():
            for i in range(weight.shape[0]):
                for j in range(weight.shape[1]):
                    at = (name, i, j)
                    importance = abs(float(weight[i, j]) * float(gradient[i, j]))
                    smoothed[at] = beta1 * smoothed.get(at, 0.0) + (1 - beta1) * importance
                    gap = abs(importance - smoothed[at])
                    uncertain[at] = beta2 * uncertain.get(at, 0.0) + (1 - beta2) * gap
    A, B = history[0]["lora_A"][0], history[0]["lora_B"][0]
    scores = []
    for i in range(A.shape[0]):
        s = {at: smoothed[at] * uncertain[at] for at in smoothed}
        of_A = sum(s["lora_A", i, j] for j in range(A.shape[1])) / A.shape[1]
        of_B = sum(s["lora_B", k, i] for k in range(B.shape[0])) / B.shape[0]
        scores.append(s["lora_E", i, 0] + of_B + of_A)
    return scores


def test_scores_are_the_papers() -> None:
    model = rw.attach(nn.Sequential(nn.Linear(5, 6)), rw.LoRA(rank=2, variant="adalora", target_modules=["0"]))
    (layer,) = adalora_layers(model)
    allocator = RankAllocator(model, 1000)
    optimizer = torch.optim.AdamW(rw.trainable_parameters(model), lr=1e-2)
    history = []
    for step in range(1, 7):
        x = torch.randn(4, 5)
        (model(x).square().mean() + allocator.penalty()).backward()
        parameters = dict(layer.named_parameters())
        history.append({name: (p.detach().clone(), p.grad.clone()) for name, p in parameters.items()})
        allocator.step(step)
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.tensor(literal_scores(history, 0.85, 0.85))
    torch.testing.assert_close(layer.scores(), expected, rtol=1e-4, atol=0)


def test_one_threshold_for_all_sites_and_exactly_the_budget() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, 2.0])
    assert most_important(scores, 3).tolist() == [True, True, False, False, False, True]  # equal scores do not add up
    for layer in adalora_layers(adapted()):
        assert int(layer.kept.sum()) == 6


def test_the_penalty_and_its_gradient() -> None:
    model = adapted(orthogonal_weight=0.3)
    allocator = RankAllocator(model, 100)
    layers = adalora_layers(model)
    expected = 0.3 * sum(
        float((layer.lora_B.T @ layer.lora_B - torch.eye(6)).detach().norm() ** 2)
        + float((layer.lora_A @ layer.lora_A.T - torch.eye(6)).detach().norm() ** 2)
        for layer in layers
    )
    penalty = allocator.penalty()
    assert float(penalty.detach()) == pytest.approx(expected / SITES, rel=1e-5)
    allocator.add_penalty_gradient()
    allocator.add_penalty_gradient()
    found = [layer.lora_A.grad for layer in layers]
    for ours, theirs in zip(found, torch.autograd.grad(penalty, [layer.lora_A for layer in layers]), strict=True):
        torch.testing.assert_close(ours, 2 * theirs)


def test_the_penalty_makes_the_factors_orthogonal() -> None:
    model = adapted()
    allocator = RankAllocator(model, 100)
    optimizer = torch.optim.Adam(rw.trainable_parameters(model), lr=2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        allocator.penalty().backward()
        optimizer.step()
    assert float(allocator.penalty().detach()) < 1e-3


@pytest.mark.parametrize("padded", [False, True])
def test_a_run_ends_with_the_budget_exactly(padded: bool, tmp_path: Path) -> None:
    model = adapted(delta_t=4, padded=padded)
    run(model, 1, 40, 40)
    allocator = RankAllocator(model, 40)
    assert allocator.finished and allocator.total_rank == RANK * SITES
    assert len(set(allocator.ranks.values())) > 1  # ranks went where they count
    rw.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    saved = {key: tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_A.weight")}
    left = {f"base_model.model.{site}.lora_A.weight": rank for site, rank in allocator.ranks.items() if rank or padded}
    if padded:
        assert saved == dict.fromkeys(left, max(allocator.ranks.values())) and not config["rank_pattern"]
    else:
        assert saved == left and config["rank_pattern"]
    assert config["peft_type"] == "LORA"
    x = batch(99)[0]
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rw.load(network(), tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)
    y = model(x)
    rw.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_a_site_that_lost_all_its_ranks_is_not_saved(tmp_path: Path) -> None:
    model = adapted()
    allocator = RankAllocator(model, 10)
    for layer, level in zip(adalora_layers(model), (1.0, 0.0, 1.0), strict=True):
        for _, sensitivity, uncertainty in layer.factors():
            sensitivity.fill_(level)
            uncertainty.fill_(1.0)
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    allocator.settle()
    assert allocator.ranks == {"0": 6, "2": 0, "4": 6}
    rw.save(model, tmp_path)
    x = batch(3)[0]
    torch.testing.assert_close(rw.load(network(), tmp_path)(x), model(x))
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x))


def test_pruned_triplets_may_return_until_the_end_and_not_after() -> None:
    model = adapted(delta_t=5)
    optimizer = run(model, 1, 15, 40)
    layers = adalora_layers(model)
    assert sum(int((layer.lora_E == 0).sum()) for layer in layers) == 0  # pruned at 15, grown again by its update
    run(model, 16, 40, 40, optimizer)
    for layer in layers:
        assert layer.scaled_B()[:, ~layer.kept].eq(0).all()
        assert layer.delta().rank == int(layer.kept.sum())


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, stopped = adapted(delta_t=3), adapted(delta_t=3)
    run(whole, 1, 30, 30)
    optimizer = run(stopped, 1, 13, 30)
    save_state(stopped, tmp_path)
    again = adapted(delta_t=3)
    load_state(again, tmp_path)
    resumed = torch.optim.AdamW(rw.trainable_parameters(again), lr=1e-2)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    run(again, 14, 30, 30, resumed)
    assert RankAllocator(again, 30).ranks == RankAllocator(whole, 30).ranks
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


class Tokens(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def trainer(model: Any, folder: Path, steps: int) -> Trainer:
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, args, train_dataset=Tokens(), callbacks=[VariantCallback()])


def test_it_runs_by_itself_in_a_trainer(tmp_path: Path) -> None:
    model = rw.attach(llama(), rw.LoRA(rank=2, variant=AdaLora(delta_t=2)))
    trainer(model, tmp_path, 10).train()
    allocator = RankAllocator(model, 10)
    assert allocator.total_rank == 2 * len(allocator.layers) == 14


def test_a_run_that_ends_early_is_cut_to_the_budget_and_says_so(tmp_path: Path, caplog: Any) -> None:
    model = rw.attach(llama(), rw.LoRA(rank=2, variant=AdaLora(delta_t=2)))
    running = trainer(model, tmp_path, 10)

    class Stop(VariantCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    running.add_callback(Stop())
    running.train()
    assert RankAllocator(model, 10).total_rank == 14
    assert "ended at step 3" in caplog.text


def test_the_callback_leaves_other_adapters_alone(tmp_path: Path) -> None:
    model = rw.attach(llama(), rw.LoRA(rank=2))
    trainer(model, tmp_path, 2).train()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(AttachError, match="adalora"):
        RankAllocator(rw.attach(network(), rw.LoRA(rank=2)), 10)
    with pytest.raises(SpecError, match="leave none of 10"):
        RankAllocator(adapted(t_initial=5, t_final=5), 10)
    with pytest.raises(TrainingError, match="zero_grad"):
        RankAllocator(adapted(), 10).step(1)
    for name, value in {
        "beta1": 1.0,
        "delta_t": 0,
        "t_final": -1,
        "start_factor": 0.5,
        "beta2": float("nan"),
    }.items():
        with pytest.raises(SpecError, match=name):
            AdaLora(**{name: value})
    with pytest.raises(SpecError, match="fold"):
        rw.LoRA(variant="adalora", anchor="fold")


def test_scores_that_are_not_finite_stop_the_run() -> None:
    model = adapted()
    allocator = RankAllocator(model, 10)
    adalora_layers(model)[1].get_buffer("sensitivity_lora_B")[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="NaN"):
        allocator.settle()


@pytest.mark.parametrize("pruned", [False, True])
def test_a_directory_that_pefts_adalora_wrote_is_read(pruned: bool, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=6, target_r=4, lora_alpha=5, total_step=10, target_modules=["0", "2"])
    theirs = peft.get_peft_model(network(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    if pruned:
        key = "{}.lora_E.default"
        kept = {"0": [True, False, True, True, False, False], "2": [True] * 6}
        theirs.peft_config["default"].rank_pattern = {key.format(site): mask for site, mask in kept.items()}
        with torch.no_grad():
            theirs.base_model.model[0].lora_E["default"][[1, 4, 5]] = 0
    x = batch(5)[0]
    expected = theirs.eval()(x)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(rw.load(network(), tmp_path)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "lora_E"])
def test_a_directory_that_pefts_adalora_wrote_without_one_of_its_factors_is_refused(
    factor: str, tmp_path: Path
) -> None:
    config = peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=["0", "2"])
    peft.get_peft_model(network(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"base_model.model.0.{factor}"]
    save_file(tensors, path)
    with pytest.raises(MissingTensor, match=factor):
        rw.load(network(), tmp_path)
