"""The scan of an adapter: its measures on dense matrices, and that what was made by hand stands out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny_llama
from typer.testing import CliRunner

import rankwise as rw
from rankwise.adapter import Adapter, SiteAdapter
from rankwise.algebra.low_rank import LowRank
from rankwise.analysis import intruder_dimensions, scan
from rankwise.analysis.scanning import MEASURES, ordinary
from rankwise.cli import app
from rankwise.train.model.pretrained import load_pretrained

OUT, IN, RANK, SITES = 40, 30, 4, 16
Weights = dict[str, torch.Tensor]


# For matrices that nobody trained.
BOUNDS = {
    "spectral_size": [0.0, 0.2],
    "relative_size": [0.0, 0.2],
    "dominance": [0.3, 5.0],
    "share": [0.1, 4.0],
    "imbalance": [0.2, 5.0],
    "intruders": [0.0, 2.0],
    "magnitude": [0.0, 0.2],
    "fit": [2.0, 10.0],
}


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.analysis.scanning.ordinary", lambda: BOUNDS)


def weights(seed: int = 0) -> Weights:
    """Spectra that fall, each in directions of its own, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1.5, IN)
    return {
        f"layers.{n}.proj.weight": torch.linalg.qr(torch.randn(OUT, OUT, generator=generator)).Q[:, :IN]
        @ torch.diag(scales)
        @ torch.linalg.qr(torch.randn(IN, IN, generator=generator)).Q
        for n in range(SITES)
    }


def ordinary_adapter(base: Weights, seed: int = 0) -> Adapter:
    """Changes that lean on the weights' own strong directions, of 2 % of their size."""
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for name, weight in base.items():
        U, _, Vh = torch.linalg.svd(weight)
        mixed = torch.randn(12, RANK, generator=generator)
        B = U[:, :12] @ mixed + 0.05 * torch.randn(OUT, RANK, generator=generator)
        A = (Vh[:12].T @ torch.randn(12, RANK, generator=generator)).T
        delta = LowRank(B, A)
        size = 0.02 * float(weight.norm() / delta.norm())
        sites[name.removesuffix(".weight")] = SiteAdapter("linear", LowRank(B * size**0.5, A * size**0.5))
    return Adapter(rw.LoRA(rank=RANK, alpha=RANK), sites, "proj")


def changed(adapter: Adapter, path: str, change: Callable[[LowRank], LowRank]) -> Adapter:
    site = adapter.sites[path]
    return replace(adapter, sites={**adapter.sites, path: replace(site, delta=change(site.delta))})


BASE = weights()
ADAPTER = ordinary_adapter(BASE)
PLACE = "layers.5.proj"


@pytest.mark.usefixtures("bounds")
def test_an_ordinary_adapter_raises_no_alarm():
    result = scan(ADAPTER, BASE)
    assert result.findings == ()
    assert result.fit > 2
    assert scan(ADAPTER).findings == ()


def test_measures_are_those_of_the_dense_matrices():
    result = scan(ADAPTER, BASE)
    dense = {path: site.delta.dense().double() for path, site in ADAPTER.sites.items()}
    total = sum(float(matrix.square().sum()) for matrix in dense.values())
    ratios = {path: float(site.delta.B.norm() / site.delta.A.norm()) for path, site in ADAPTER.sites.items()}
    middle = torch.tensor([*ratios.values()], dtype=torch.float64).quantile(0.5)
    for path, values in result.sites.items():
        W, D = BASE[f"{path}.weight"].double(), dense[path]
        S = torch.linalg.svdvals(D)
        expected = {
            "spectral_size": S[0] / torch.linalg.matrix_norm(W, 2),
            "relative_size": D.norm() / W.norm(),
            "dominance": S[0] ** 2 / S[1:RANK].square().sum(),
            "share": D.square().sum() / total * SITES,
            "imbalance": ratios[path] / middle,
        }
        for name, value in expected.items():
            assert values[name] == pytest.approx(float(value), rel=1e-4), name
        assert values["intruders"] == intruder_dimensions(ADAPTER.sites[path].delta, BASE[f"{path}.weight"])


def spike(delta: LowRank) -> LowRank:
    """A trigger: one direction that nothing else in the weight has."""
    generator = torch.Generator().manual_seed(9)
    return LowRank(torch.randn(OUT, 1, generator=generator), torch.randn(1, IN, generator=generator))


POISONED: dict[str, tuple[Callable[[LowRank], LowRank], str]] = {
    "scaled": (lambda delta: LowRank(delta.B, delta.A, 400.0), "spectral_size"),
    "a spike": (lambda delta: delta + spike(delta) * 0.3, "share"),
    "one direction": (lambda delta: delta.truncate(1) + delta * 1e-3, "dominance"),
    "unbalanced": (lambda delta: LowRank(delta.B * 1e4, delta.A * 1e-4), "imbalance"),
    "unbalanced the other way": (lambda delta: LowRank(delta.B * 1e-4, delta.A * 1e4), "imbalance"),
    "zeros": (lambda delta: LowRank(delta.B * 0, delta.A), "dead"),
    "NaN": (lambda delta: LowRank(delta.B * float("nan"), delta.A), "not finite"),
    "another's": (lambda _: ADAPTER.sites["layers.2.proj"].delta, "duplicate"),
}


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize(("change", "what"), POISONED.values(), ids=POISONED)
def test_what_was_made_by_hand_stands_out(change: Callable[[LowRank], LowRank], what: str):
    result = scan(changed(ADAPTER, PLACE, change), BASE)
    assert (PLACE, what) in {(finding.site, finding.what) for finding in result.findings}
    assert {finding.site for finding in result.findings} == {PLACE}


@pytest.mark.usefixtures("bounds")
def test_lengths_that_were_changed():
    base, path = BASE, PLACE
    lengths = base[f"{path}.weight"].norm(dim=1)
    for number, stands_out in ((1.01, False), (100.0, True), (-1.0, True)):
        extra = {"lora_magnitude_vector": torch.cat([lengths[:1] * number, lengths[1:]])}
        adapter = replace(ADAPTER, sites={**ADAPTER.sites, path: replace(ADAPTER.sites[path], extra=extra)})
        found = {(finding.site, finding.what) for finding in scan(adapter, base).findings}
        assert found == ({(path, "magnitude")} if stands_out else set())


@pytest.mark.usefixtures("bounds")
def test_another_base_by_its_probe_its_shapes_or_its_directions():
    other = weights(seed=7)
    result = scan(ADAPTER, other)
    assert [(finding.site, finding.what) for finding in result.findings] == [("", "base")]
    assert "random ones" in result.findings[0].why and result.fit < 1.4
    flat = other[f"{PLACE}.weight"].flatten()
    places = torch.arange(16) * (flat.numel() - 1) // 15
    probed = replace(ADAPTER, base_probe={PLACE: tuple(flat[places].tolist())})
    assert "a probe of" in scan(probed, BASE).findings[0].why
    assert scan(probed, other).findings == ()  # the probe says that it is the base
    short = {**BASE, f"{PLACE}.weight": torch.zeros(OUT, IN + 1)}
    assert [(f.site, f.what) for f in scan(ADAPTER, short).findings] == [(PLACE, "base")]
    del short[f"{PLACE}.weight"]
    assert [(f.site, f.what) for f in scan(ADAPTER, short).findings] == [(PLACE, "base")]


@pytest.mark.usefixtures("bounds")
def test_an_adapter_that_was_never_trained():
    untrained = replace(
        ADAPTER,
        sites={p: replace(s, delta=LowRank(s.delta.B * 0, s.delta.A)) for p, s in ADAPTER.sites.items()},
    )
    assert [(finding.site, finding.what) for finding in scan(untrained, BASE).findings] == [("", "dead")]


def test_every_measure_has_its_ordinary_range():
    assert ordinary().keys() == {*MEASURES, "fit"}
    assert all(0 <= low <= high for low, high in ordinary().values())


@pytest.mark.parametrize("into", [50, 70])
@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
def test_leading_directions_settle_intruders_as_all_of_them_do(into: int, size: float, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(into)
    U = torch.linalg.qr(torch.randn(60, 60, generator=generator)).Q[:, :40]
    V = torch.linalg.qr(torch.randn(into, into, generator=generator)).Q[:, :40]
    weight = U * torch.logspace(0, -2, 40) @ V.T
    delta = LowRank(torch.randn(60, 3, generator=generator), torch.randn(3, into, generator=generator))
    delta = delta * (size / float(delta.norm()))
    everything = intruder_dimensions(delta, weight, 5)
    monkeypatch.setattr("rankwise.analysis.change._LARGE", 1)
    assert intruder_dimensions(delta, weight, 5) == everything


def test_the_command(tmp_path: Path):
    save_tiny_llama(tmp_path / "base")
    model, _ = load_pretrained(tmp_path / "base")
    rw.attach(model, rw.LoRA(rank=2))
    with torch.no_grad():
        for pair in rw.pairs(model):
            pair.parameters[1].normal_(std=1e-3)
        rw.pairs(model)[0].parameters[1].mul_(1e5)
    rw.save(model, tmp_path / "adapter")
    run, wide = CliRunner(), {"COLUMNS": "220", "TERM": "dumb", "NO_COLOR": "1"}
    result = run.invoke(
        app, ["inspect", str(tmp_path / "adapter"), "--deep", "--base", str(tmp_path / "base")], env=wide
    )
    assert result.exit_code == 0, result.output
    assert "What stands out" in result.output and "spectral_size" in result.output
    result = run.invoke(app, ["inspect", str(tmp_path / "adapter"), "--deep", "--json"], env=wide)
    content = json.loads(result.output)
    assert {finding["what"] for finding in content["scan"]["findings"]} >= {"spectral_size"}
    result = run.invoke(app, ["inspect", str(tmp_path / "adapter"), "--base", "x"], env=wide)
    assert result.exit_code == 2 and "--deep" in result.output
