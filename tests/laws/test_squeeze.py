"""squeeze: what it gives equals the dense definition, and the errors that it states are the true ones."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo import perturb

import rankwise as rw
from rankwise.adapter import Adapter, SiteAdapter
from rankwise.algebra.low_rank import LowRank
from rankwise.cli import app
from rankwise.errors import EvidenceError, SpecError, UnsupportedAdapter
from rankwise.evidence.activations import InputCovariance
from rankwise.format.save_load import portable
from rankwise.spec import LoRA
from rankwise.squeezing import Squeezed, squeeze

sizes = st.integers(1, 12)
SPEC = LoRA(rank=4)


@st.composite
def drawn_sites(draw, sites: int = 3) -> dict[str, LowRank]:
    """Changes of any shapes, ranks (larger than the shape too), scales and sizes; some of nearly equal products."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def change() -> LowRank:
        out, into, rank = draw(sizes), draw(sizes), draw(sizes)
        B, A = torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)
        delta = LowRank(B, A, draw(st.sampled_from([1.0, 2.0, 1e-3, 16 / 8**0.5])))
        if draw(st.booleans()):  # BA − B₀A with B near B₀
            delta = delta - LowRank(B + 0.01 * torch.randn(B.shape, generator=generator), A, delta.scale)
        return delta

    return {f"layer.{i}": change() for i in range(sites)}


def adapter_of(changes: dict[str, LowRank]) -> Adapter:
    return Adapter(SPEC, {path: SiteAdapter("linear", delta) for path, delta in changes.items()}, r"layer\.\d")


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW of every site in fp64."""
    deltas = {path: site.delta for path, site in adapter.sites.items()}
    return {path: delta.scale * delta.B.double() @ delta.A.double() for path, delta in deltas.items()}


def factors(adapter: Adapter, seed: int) -> dict[str, Tensor]:
    """Inputs x in rows for every site, of very different lengths along different directions."""
    generator = torch.Generator().manual_seed(seed)
    widths = {path: site.delta.shape[1] for path, site in adapter.sites.items()}
    return {
        path: torch.randn(20, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, width).double()
        for path, width in widths.items()
    }


def check(wide: Adapter, squeezed: Squeezed, seen: dict[str, Tensor] | None) -> None:
    """The stated errors are true, and of every site the least possible at its rank."""
    changes, left = dense(wide), dense(squeezed.adapter)
    lost, whole = 0.0, 0.0
    for path, change in changes.items():
        F = torch.eye(change.shape[1], dtype=torch.float64) if seen is None else seen[path]
        error, size = float(((change - left[path]) @ F.T).norm()), float((change @ F.T).norm())
        assert squeezed.errors[path] == pytest.approx(error / size, abs=1e-5)
        best = torch.linalg.svdvals(change @ F.T)[squeezed.adapter.sites[path].delta.rank :].norm()
        assert error == pytest.approx(float(best), abs=1e-5 * size)
        lost, whole = lost + error**2, whole + size**2
    assert squeezed.error == pytest.approx((lost / whole) ** 0.5, abs=1e-5)


@given(drawn_sites(), sizes, st.sampled_from(["unweighted", "covariance", "factor"]))
def test_each_site_is_the_best_of_its_rank(changes, rank, weighting):
    wide = adapter_of(changes)
    seen = None if weighting == "unweighted" else factors(wide, 1)
    inputs = seen
    if seen is not None and weighting == "covariance":
        inputs = {path: InputCovariance(F.T @ F, len(F)) for path, F in seen.items()}
    squeezed = squeeze(wide, rank=rank, inputs=inputs)
    check(wide, squeezed, seen)
    for path, site in squeezed.adapter.sites.items():
        before = wide.sites[path].delta
        assert site.delta.rank == min(rank, before.rank, *before.shape)
        assert site.delta.scale == before.scale
        torch.testing.assert_close(site.delta.B.norm(dim=0), site.delta.A.norm(dim=1))


def every_choice(wide: Adapter) -> list[tuple[int, float]]:
    """(numbers, squared error) of every way to give the sites ranks of at least 1."""
    spectra = {path: torch.linalg.svdvals(change).square() for path, change in dense(wide).items()}
    ranks = [range(1, min(site.delta.rank, *site.delta.shape) + 1) for site in wide.sites.values()]
    costs = [sum(site.delta.shape) for site in wide.sites.values()]
    return [
        (
            sum(rank * cost for rank, cost in zip(choice, costs, strict=True)),
            sum(float(row[rank:].sum()) for row, rank in zip(spectra.values(), choice, strict=True)),
        )
        for choice in itertools.product(*ranks)
    ]


@given(drawn_sites(sites=2), st.floats(0, 1))
def test_a_budget_is_kept_and_spent_best(changes, share):
    wide = adapter_of(changes)
    choices = every_choice(wide)
    least, most = min(choices)[0], max(choices)[0]
    budget = round(least + share * (most - least))
    squeezed = squeeze(wide, budget=budget)
    check(wide, squeezed, None)
    assert squeezed.parameters <= budget
    # No choice with as many numbers or fewer loses less: the best bargains come first.
    whole = sum(float(change.square().sum()) for change in dense(wide).values())
    least_lost = min(lost for numbers, lost in choices if numbers <= squeezed.parameters)
    largest = max(sum(site.delta.shape) for site in wide.sites.values())
    if squeezed.parameters > budget - largest or budget == most:  # nothing that would have fitted was passed over
        assert squeezed.error**2 * whole == pytest.approx(least_lost, abs=1e-6 * whole)


@given(drawn_sites(sites=2), st.floats(0, 0.99))
def test_an_error_is_kept_with_few_numbers(changes, error):
    wide = adapter_of(changes)
    squeezed = squeeze(wide, error=error)
    check(wide, squeezed, None)
    one_each = all(site.delta.rank == 1 for site in squeezed.adapter.sites.values())
    assert one_each or squeezed.error <= error + 1e-9
    whole = sum(float(change.square().sum()) for change in dense(wide).values())
    # One rank less anywhere would be too much.
    for path, change in dense(wide).items():
        rank = squeezed.adapter.sites[path].delta.rank
        if rank > 1:
            more = squeezed.error**2 + float(torch.linalg.svdvals(change)[rank - 1]) ** 2 / whole
            assert more**0.5 > error - 1e-9


def test_equal_ranks_and_shapes_keep_the_largest_singular_values_of_all():
    generator = torch.Generator().manual_seed(0)
    sites = {
        f"fc{i}": SiteAdapter(
            "linear",
            LowRank(10.0**-i * torch.randn(12, 6, generator=generator), torch.randn(6, 10, generator=generator), 0.5),
        )
        for i in range(3)
    }
    wide = Adapter(LoRA(rank=6), sites, ("fc0", "fc1", "fc2"))
    squeezed = squeeze(wide, budget=9 * 22)
    assert [site.delta.rank for site in squeezed.adapter.sites.values()] == [6, 2, 1]


# ---------------------------------------------------------------------------------------------------- with a model


def trained(**spec: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))
    X = torch.randn(16, 12)
    rw.attach(model, LoRA(**spec), batches=[X], loss=lambda model, x: model(x).square().mean())
    perturb(model, 0.3, 1)
    return model


@pytest.mark.parametrize("init", ["kaiming", "lora-ga", "pissa"])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_a_squeezed_adapter_is_written_and_loaded(tmp_path: Path, init: str, scaling: str):
    model = trained(rank=4, init=init, scaling=scaling)
    rw.save(model, tmp_path / "wide")
    squeezed = squeeze(rw.read(tmp_path / "wide"), budget=90)
    rw.write(squeezed.adapter, tmp_path / "narrow")
    rw.detach(model)
    rw.load(model, tmp_path / "narrow")
    for path, site in squeezed.adapter.sites.items():
        found = rw.pairs(model)[0 if path == "0" else 1]
        torch.testing.assert_close(found.B @ found.A * found.scale, site.delta.dense())


def test_covariances_of_the_adapted_model_weight_it():
    """The stated error is that of the layer's outputs on these very inputs."""
    model = trained(rank=6)
    X = torch.randn(64, 12) * torch.logspace(0, -3, 12)
    covariances = rw.covariances(model, [X], forward=lambda model, x: model(x))
    wide = portable(model)
    weighted, plain = squeeze(wide, rank=2, inputs=covariances), squeeze(wide, rank=2)
    change = dense(wide)["0"] @ X.double().T

    def lost(squeezed: Squeezed) -> float:
        return float((change - dense(squeezed.adapter)["0"] @ X.double().T).norm() / change.norm())

    assert lost(weighted) == pytest.approx(weighted.errors["0"], abs=1e-5)
    assert lost(weighted) < lost(plain)


def test_what_is_no_plain_pair_is_refused():
    wide = portable(trained(rank=4, variant="dora"))
    with pytest.raises(UnsupportedAdapter, match="0: has lora_magnitude_vector beside its pair"):
        squeeze(wide, rank=2)


def test_adalora_and_untrained_sites(tmp_path: Path):
    model = trained(rank=4, variant="adalora")
    check(wide := portable(model), squeeze(wide, rank=2), None)
    untrained = rw.attach(nn.Sequential(nn.Linear(12, 10)), LoRA(rank=4))
    squeezed = squeeze(portable(untrained), rank=2)
    assert squeezed.error == 0.0
    assert not squeezed.adapter.sites["0"].delta.dense().any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "expected one of rank, budget and error"),
        ({"rank": 2, "error": 0.1}, "expected one of rank, budget and error"),
        ({"rank": 0}, "expected a rank of at least 1, found 0"),
        ({"budget": 39}, "rank 1 at all 2 sites has 40 numbers, expected budget=39"),
        ({"error": 1.0}, "expected an error from 0 on and below 1, found 1.0"),
        ({"error": float("nan")}, "expected an error from 0 on and below 1, found nan"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    wide = portable(trained(rank=4))
    with pytest.raises(SpecError, match=said):
        squeeze(wide, **options)


def test_inputs_for_some_sites_only_are_refused():
    wide = portable(trained(rank=4))
    with pytest.raises(EvidenceError, match="2: no inputs are given for this site"):
        squeeze(wide, rank=1, inputs={"0": torch.eye(12)})


def test_the_command_line(tmp_path: Path):
    rw.save(trained(rank=4), tmp_path / "wide")
    (tmp_path / "wide" / "labels.json").write_text('["bad", "good"]')
    done = CliRunner().invoke(
        app, ["squeeze", str(tmp_path / "wide"), "--rank", "2", "--out", str(tmp_path / "narrow")]
    )
    assert done.exit_code == 0, done.output
    expected = squeeze(rw.read(tmp_path / "wide"), rank=2)
    assert f"{expected.error:.2%}" in done.output
    found = rw.read(tmp_path / "narrow")
    assert all(site.delta.rank == 2 for site in found.sites.values())
    assert (tmp_path / "narrow" / "labels.json").read_text() == '["bad", "good"]\n'
    refused = CliRunner().invoke(app, ["squeeze", str(tmp_path / "wide"), "--out", str(tmp_path / "other")])
    assert refused.exit_code == 2
    assert not (tmp_path / "other").exists()
