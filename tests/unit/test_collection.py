"""What is collected is decided before anything runs: printable, the same for all callers, and true in its sizes."""

import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo import left_as_it_was

import rankwise as rw
from rankwise.collection import given_evidence, gradient_collection, needed_evidence
from rankwise.errors import EvidenceError, SpecError
from rankwise.evidence.activations import RunningSVD
from rankwise.evidence.sketch import _Running
from rankwise.layers.increments import Outer
from rankwise.layers.kinds import base_matrix
from rankwise.sites import Site, site_generator

DATA = [torch.randn(30, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
ONE_GROUP = 4 * 16 * 20  # bytes of the largest layer's gradient


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 8))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()


@pytest.mark.parametrize("init", ["lora-ga", "eva", "corda", "pissa", "kaiming"])
@pytest.mark.parametrize(
    "options", [{"method": "sketch"}, {"method": "exact"}, {"method": "exact", "memory_budget": ONE_GROUP}]
)
def test_plain_calls_give_the_start_that_attach_gives(init: str, options: dict[str, Any]) -> None:
    if init == "eva":
        init = {"name": "eva", "rho": 1.0}  # type: ignore[assignment]  # else ranks are redistributed
    model, spec, starts = network(), rw.LoRA(rank=2, init=init), {}
    planned = rw.plan(model, spec, **options)
    for part in planned.evidence.passes:
        evidence = rw.evidence.collect(model, planned.evidence, part, DATA, loss)
        for site in part.sites:
            weight = base_matrix(model.get_submodule(site.name))
            generator = site_generator(spec.seed, site.name)
            starts[site.name] = spec.init(weight, site, evidence[site.name], generator)
    attached = rw.attach(model, spec, batches=iter(DATA), loss=loss, **options)
    assert [pair.name for pair in rw.pairs(attached)] == list(starts)
    for pair in rw.pairs(attached):
        assert torch.equal(pair.A, starts[pair.name].A) and torch.equal(pair.B, starts[pair.name].B)


def sites(*shapes: tuple[int, int], rank: int = 2) -> list[Site]:
    return [Site(f"layers.{i}", "linear", shape, rank, 1.0) for i, shape in enumerate(shapes)]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12), st.integers(4 * 1600, 20_000)
)
def test_groups_keep_the_order_fit_the_budget_and_are_as_few_as_that_allows(
    shapes: list[tuple[int, int]], budget: int
) -> None:
    chosen = sites(*shapes)
    passes = gradient_collection(chosen, "exact", budget).passes
    assert [site for part in passes for site in part.sites] == chosen
    for part in passes:
        assert part.bytes == sum(4 * out * into for out, into in (site.shape for site in part.sites)) <= budget
    for part, following in pairwise(passes):
        out, into = following.sites[0].shape
        assert part.bytes + 4 * out * into > budget


@pytest.mark.parametrize("shape", [(30, 50), (6, 50)])
def test_a_sketch_and_directions_take_the_bytes_that_are_planned(shape: tuple[int, int]) -> None:
    chosen = sites(shape)
    (part,) = gradient_collection(chosen, "sketch", None).passes
    factor = _Running(shape, part.directions["layers.0"], torch.Generator(), torch.device("cpu"))
    x, grad_y = torch.randn(200, shape[1]), torch.randn(200, shape[0])
    factor.add(Outer(x, grad_y))
    held = (factor.U, factor.V, factor.probe, factor.probed)
    assert part.bytes == sum(tensor.nbytes for tensor in held)

    (part,) = needed_evidence(chosen, rw.inits.Eva(rho=1.0)).passes
    running = RunningSVD(part.directions["layers.0"] + 8)
    running.add(x)
    assert part.bytes == running.v.nbytes


def test_only_one_group_of_exact_gradients_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    counts: list[int] = []
    collect = rw.evidence.collect

    def watched(*args: Any, **options: Any) -> Any:
        gc.collect()
        counts.append(len(alive))
        evidence = collect(*args, **options)
        alive.update(evidence.values())
        return evidence

    monkeypatch.setattr("rankwise.attaching.collect", watched)
    spec = rw.LoRA(rank=2, init="lora-ga")
    rw.attach(network(), spec, batches=DATA, loss=loss, method="exact", memory_budget=ONE_GROUP)
    assert counts == [0, 0, 0]


class Untouchable:
    """Batches that must not be looked at."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a batch was read")


@pytest.mark.parametrize("init", ["lora-ga", "eva", "corda", "kaiming", "loftq"])
def test_a_dry_run_reads_no_batch_and_changes_nothing(init: str) -> None:
    model, spec = network(), rw.LoRA(rank=2, init=init)
    with left_as_it_was(model):
        planned = rw.attach(model, spec, batches=Untouchable(), dry_run=True)
    assert planned == rw.plan(model, spec) and planned.evidence == rw.plan(model, spec).evidence
    with pytest.raises(SpecError, match="rank 13"):
        rw.attach(model, rw.LoRA(rank=13, init=init), dry_run=True)


def test_a_dry_run_with_evidence_at_hand_collects_nothing() -> None:
    model, spec = network(), rw.LoRA(rank=2, init=rw.inits.LoraGA(align="sign"))
    evidence = rw.gradients(model, DATA, loss=loss)
    tight = {"memory_budget": 10, "dry_run": True}  # of no interest where nothing is collected
    assert rw.attach(model, spec, evidence=evidence, **tight).evidence.kind == "given"
    with pytest.raises(EvidenceError, match="alone takes"):
        rw.attach(model, spec, **tight)


def printed(**options: Any) -> str:
    init = options.pop("init", "lora-ga")
    return str(rw.plan(network(), rw.LoRA(rank=2, init=init), **options))


def test_a_plan_prints_its_passes_and_says_why() -> None:
    exact = printed(method="exact", memory_budget=ONE_GROUP)
    assert "starts from exact gradients: method 'exact' was asked for" in exact
    assert [line.split()[:4] for line in exact.splitlines()[-3:]] == [
        [number, name, name, "1"] for number, name in (("1", "0"), ("2", "2"), ("3", "4"))
    ]
    sketch = printed(memory_budget=1000)
    assert "starts from sketched gradients: the exact ones take 0.00 GiB for 3 layers" in sketch
    assert sketch.splitlines()[-1].split() == ["1", "0", "4", "3", "8", f"{4 * 16 * (28 + 36 + 28):,}"]
    assert "starts from exact gradients: the start needs them whole" in printed(init=rw.inits.LoraGA(align="adam"))
    assert "starts from nothing: init Kaiming needs nothing" in printed(init="kaiming")
    assert "starts from full-precision weights: init Loftq needs weights of base.st" in printed(
        init=rw.inits.Loftq("base.st")
    )


def test_any_init_may_name_a_file_of_weights(tmp_path: Any) -> None:
    """No method is known by name: what counts is what an init needs and where it says that this may come from."""

    class Copy(rw.inits.Init):
        needs = "weights"

        def __init__(self, reference: str) -> None:
            self.reference = reference

        def __call__(self, weight: Tensor, site: Site, evidence: Tensor, generator: torch.Generator) -> Any:
            return rw.sites.Start(evidence[: site.rank].clone(), weight.new_zeros(site.shape[0], site.rank))

    model = network()
    save_file({f"{name}.weight": model[int(name)].weight.detach() + 1 for name in ("0", "2", "4")}, tmp_path / "w")
    planned = rw.plan(model, rw.LoRA(rank=2))
    collection = needed_evidence(planned, Copy(str(tmp_path / "w")))
    assert collection.kind == "weights" and not collection.from_batches
    evidence = rw.evidence.collect(model, collection, collection.passes[0])
    for site in planned:
        assert torch.equal(evidence[site.name], model.get_submodule(site.name).weight + 1)


def test_a_wrong_method_is_refused_whatever_the_init() -> None:
    for init in ("kaiming", "lora-ga"):
        with pytest.raises(EvidenceError, match=r"method must be one of auto, exact, sketch, found 'exat'"):
            printed(init=init, method="exat")


def test_what_was_given_cannot_be_collected() -> None:
    model = network()
    planned = rw.plan(model, rw.LoRA(rank=2))
    collection = given_evidence(planned, rw.inits.Kaiming(), dict.fromkeys(site.name for site in planned))
    with pytest.raises(EvidenceError, match="nothing to collect"):
        rw.evidence.collect(model, collection, collection.passes[0])
