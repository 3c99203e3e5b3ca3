"""Gradients and starts with two processes: those of one process on the union of the batches."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw
from rankwise.evidence import ExactGradient, SketchedGradient
from rankwise.methods import resolve
from rankwise.optim import OPTIMIZERS

RANK = 2


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).double()


def batches() -> list[dict[str, torch.Tensor]]:
    """Few tokens, so that every gradient has a rank below what a sketch holds and both are exact."""
    rows = torch.randint(64, (4, 1, 5), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def one_share(rank: int) -> list[dict[str, torch.Tensor]]:
    """This process's batches: not as many as the other's."""
    return batches()[:1] if rank == 0 else batches()[1:]


def run(rank: int, check: Callable[[int], None], meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        check(rank)
    finally:
        dist.destroy_process_group()


def together(check: Callable[[int], None], folder: Path) -> None:
    mp.spawn(run, (check, str(folder / "meeting")), nprocs=2)


def dense(evidence: ExactGradient | SketchedGradient) -> torch.Tensor:
    if isinstance(evidence, ExactGradient):
        return evidence.matrix
    return (evidence.U * evidence.S) @ evidence.V.T


def expected() -> dict[str, torch.Tensor]:
    return {name: evidence.matrix for name, evidence in rw.gradients(llama(), batches()).items()}


def check_same_gradients(rank: int) -> None:
    truth = expected()
    options = [("exact", {}), ("sketch", {"rank": 10}), ("sketch", {"rank": 10, "passes": 2})]
    for method, more in options:
        found = rw.gradients(llama(), one_share(rank), method=method, **more)
        for name, G in truth.items():
            gap = (dense(found[name]) - G).norm() / G.norm()
            assert gap < 1e-5, (method, more, name, float(gap))


def check_same_start(rank: int) -> None:
    spec = rw.LoRA(rank=RANK, init="lora-ga")
    alone = llama()
    truth = expected()
    evidence = {name: ExactGradient(G) for name, G in truth.items()}
    starts = {pair.name: pair for pair in rw.pairs(rw.attach(alone, spec, evidence=evidence))}
    sketch = rw.gradients(llama(), one_share(rank), method="sketch", rank=10)
    for method, source in (("exact", {"batches": one_share(rank)}), ("sketch", {"evidence": sketch})):
        model = rw.attach(llama(), spec, **source)
        for pair in rw.pairs(model):
            truths = starts[pair.name]
            values = torch.linalg.svdvals(truth[pair.name])
            assert values[RANK - 1] > 1.01 * values[RANK], "no gap, no telling the subspaces apart"
            for ours, theirs in ((pair.A, truths.A), (pair.B.T, truths.B.T)):
                q, p = torch.linalg.qr(ours.detach().T).Q, torch.linalg.qr(theirs.detach().T).Q
                assert float((q - p @ (p.T @ q)).norm()) < 1e-3, (method, pair.name)  # sine of the largest angle


def check_failing_together(rank: int) -> None:
    share = one_share(rank)
    if rank == 1:
        share[0]["labels"] = torch.full_like(share[0]["labels"], -100)  # the mean over no token is NaN
    expected = "^batch 0: the loss is nan" if rank else "^process 1: batch 0: the loss is nan"
    with pytest.raises(rw.RankwiseError, match=expected):
        rw.gradients(llama(), share)


def check_same_input_directions(rank: int) -> None:
    whole = {key: torch.cat([batch[key] for batch in batches()]) for key in ("input_ids", "labels")}
    twice = rw.activations(llama(), [whole], rank=8)
    shared = rw.activations(llama(), one_share(rank), rank=8)
    covariance, shared_covariance = rw.covariances(llama(), batches()), rw.covariances(llama(), one_share(rank))
    for name, truth in twice.items():  # which both processes have seen
        assert 2 * shared[name].count == truth.count == 40
        torch.testing.assert_close(2**0.5 * shared[name].singular_values, truth.singular_values, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(shared[name].explained, truth.explained, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(shared_covariance[name].matrix, covariance[name].matrix)


class TwoWays(nn.Module):
    """A mixture of two experts, each of which only one process's data reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return self.experts[which](x).square().sum()


def check_layer_that_one_process_never_reaches(rank: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    for method in ("exact", "sketch"):
        found = rw.gradients(TwoWays(), [x], ["0", "1"], method, loss=lambda m, b: m(b, rank))
        model = TwoWays()
        (model(x, 0) + model(x, 1)).backward()
        for number in (0, 1):
            G = found[f"experts.{number}"]
            u, s, v = G.svd(4)
            torch.testing.assert_close((u * s) @ v.T, model.experts[number].weight.grad / 2)


def check_data_parallel_training(rank: int) -> None:
    """Every process starts alike and stays alike."""
    model = rw.attach(llama(), rw.LoRA(rank=RANK, init="lora-ga"), batches=one_share(rank))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(rw.trainable_parameters(model), lr=0.1)
    for batch in batches()[rank : rank + 2]:
        optimizer.zero_grad()
        wrapped(**batch).loss.backward()
        optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in rw.trainable_parameters(model)])
    everyones = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyones, mine)
    assert torch.equal(*everyones) and float(mine.norm()) > 0


def sharded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def check_gradients_of_a_sharded_model(rank: int) -> None:
    truth = expected()
    for method, more in (("exact", {}), ("sketch", {"rank": 10})):
        found = rw.gradients(sharded(llama()), one_share(1), method=method, **more)
        whole = rw.gradients(llama(), one_share(1), method=method, **more)
        for name in truth:
            torch.testing.assert_close(dense(found[name]), dense(whole[name]), rtol=1e-4, atol=1e-9)


def check_sharded_training(rank: int) -> None:
    """Adapter and base sharded: the losses of one process that sees both processes' batches, with every optimizer."""
    evidence = {name: ExactGradient(G) for name, G in expected().items()}
    for optimizer in OPTIMIZERS:
        alone, shared = (rw.attach(llama(), rw.LoRA(rank=RANK, init="lora-ga"), evidence=evidence) for _ in range(2))
        sharded(shared)
        truth = losses_of(alone, optimizer, batches()[:2])
        mine = losses_of(shared, optimizer, [batches()[rank]])
        dist.all_reduce(mine)
        assert truth[-1] < truth[0]
        torch.testing.assert_close(mine / 2, truth, rtol=1e-5, atol=1e-7)


def check_saving_a_sharded_model(rank: int) -> None:
    """Every process gathers, the first writes: what is loaded is the sharded model, whatever the variant."""
    x = batches()[0]["input_ids"]
    for number, variant in enumerate(("lora", "dora", "bottleneck")):
        model = llama()
        spec = rw.LoRA(
            rank=RANK, init="pissa" if number < 2 else "kaiming", variant=variant, modules_to_save=["lm_head"]
        )
        sharded(rw.attach(model, spec))
        stepper = torch.optim.SGD(rw.trainable_parameters(model), lr=0.5)
        for _ in range(2):
            model(**batches()[rank]).loss.backward()
            stepper.step()
            stepper.zero_grad()
        trained = model(x).logits
        for directory, save in (("saved", rw.save), ("pretrained", save_as_trainer_does)):
            with tempfile.TemporaryDirectory() as parent:
                folders = [f"{parent}/{directory}"]
                dist.broadcast_object_list(folders)
                save(model, folders[0])
                dist.barrier()
                loaded = rw.load(llama(), folders[0])
                dist.barrier()
            torch.testing.assert_close(loaded(x).logits, trained, rtol=1e-5, atol=1e-6)
            assert float((trained - llama()(x).logits).detach().abs().max()) > 1e-2, "it has learnt"


def save_as_trainer_does(model: LlamaForCausalLM, folder: str) -> None:
    """The whole state is gathered by all; the first process alone saves."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)


def losses_of(model: nn.Module, optimizer: str, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Those of three steps."""
    stepper = resolve(OPTIMIZERS, optimizer, "optimizer")(model, lr=1e-2)
    losses = []
    for _ in range(3):
        stepper.zero_grad()
        loss = sum(model(**batch).loss for batch in data) / len(data)
        loss.backward()
        stepper.step()
        losses.append(loss.detach())
    return torch.stack(losses)


CHECKS = [
    check_same_gradients,
    check_same_start,
    check_failing_together,
    check_same_input_directions,
    check_layer_that_one_process_never_reaches,
    check_data_parallel_training,
    check_gradients_of_a_sharded_model,
    check_sharded_training,
    check_saving_a_sharded_model,
]


def every_check(rank: int) -> None:
    for check in CHECKS:
        check(rank)


def test_two_processes(tmp_path: Path) -> None:
    together(every_check, tmp_path)
