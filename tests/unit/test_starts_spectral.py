"""Starts from singular directions, each against a slow literal transcription of its paper."""

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import EvidenceError, SpecError
from rankwise.evidence import ExactGradient, InputCovariance, InputDirections
from rankwise.sites import Site, Start

R, S = 3, 0.5


def site(weight: Tensor, rank: int = R, kind: str = "linear") -> Site:
    return Site("layer", kind, (weight.shape[0], weight.shape[1]), rank, S)


def start(init: rw.inits.Init, weight: Tensor, evidence: object = None, rank: int = R) -> Start:
    return init(weight, site(weight, rank), evidence, torch.Generator().manual_seed(0))


def product(start: Start) -> Tensor:
    return S * start.B @ start.A


def same_pair(found: Start, B: Tensor, A: Tensor) -> None:
    """Equal up to the sign of each direction, which a singular value decomposition leaves open."""
    signs = torch.sign((found.B * B).sum(0))
    torch.testing.assert_close(found.B * signs, B, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.A * signs[:, None], A, atol=1e-4, rtol=1e-3)


def test_milora_takes_the_last_triplets() -> None:
    W = torch.randn(7, 10)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    found = start(rw.inits.Milora(), W)
    same_pair(found, U[:, -R:] @ torch.diag(s[-R:] / S).sqrt(), torch.diag(s[-R:] / S).sqrt() @ Vh[-R:])
    assert found.needs_anchor


def test_pissa_and_milora_share_out_the_weight() -> None:
    W = torch.randn(6, 9)
    torch.testing.assert_close(
        product(start(rw.inits.Pissa(), W, rank=2)) + product(start(rw.inits.Milora(), W, rank=4)), W
    )


def literal_corda(W: Tensor, C: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """Yang 2024, section 3: SVD(W C) = U Σ Vᵀ, W = U Σ (Vᵀ C⁻¹), B = U_r √Σ_r, A = √Σ_r (Vᵀ C⁻¹)_r."""
    C = C / C.diagonal().mean() + 0.01 * torch.eye(len(C))
    U, s, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    Vh_hat = Vh @ torch.linalg.inv(C)
    chosen = slice(-R, None) if last else slice(None, R)
    root = torch.diag((s[chosen] / S).sqrt())
    return U[:, chosen] @ root, root @ Vh_hat[chosen]


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_the_papers(mode: str) -> None:
    W, X = torch.randn(7, 10), torch.randn(400, 10) * torch.linspace(0.2, 3, 10)
    C = X.T @ X / len(X)
    found = start(rw.inits.Corda(mode=mode), W, InputCovariance(C, 400))  # type: ignore[arg-type]
    same_pair(found, *literal_corda(W, C, last=mode == "kpm"))


def test_corda_depends_on_the_covariances_shape_only() -> None:
    W, X = torch.randn(7, 10), torch.randn(400, 10) * torch.linspace(0.2, 3, 10)
    C = X.T @ X / len(X)
    one, other = (start(rw.inits.Corda(), W, InputCovariance(c * C, 400)) for c in (1.0, 1e4))
    same_pair(one, other.B, other.A)
    white = start(rw.inits.Corda(), W, InputCovariance(5 * torch.eye(10), 400))
    torch.testing.assert_close(product(white), product(start(rw.inits.Pissa(), W)), atol=1e-5, rtol=1e-4)


def test_corda_in_all_directions_gives_the_weight_whatever_the_covariance() -> None:
    W, X = torch.randn(5, 8), torch.randn(2, 8)  # C has rank 2 of 8: damping makes its inverse accurate
    found = start(rw.inits.Corda(), W, InputCovariance(X.T @ X / 2, 2), rank=5)
    torch.testing.assert_close(product(found), W, atol=1e-3, rtol=1e-3)
    with pytest.raises(EvidenceError, match="all zero"):
        start(rw.inits.Corda(), W, InputCovariance(torch.zeros(8, 8), 2))


def test_eva_takes_the_components_and_starts_at_zero() -> None:
    W, V = torch.randn(7, 10), torch.linalg.qr(torch.randn(10, 6)).Q.T
    evidence = InputDirections(V, torch.ones(6), torch.linspace(0.3, 0.1, 6), 100)
    found = start(rw.inits.Eva(), W, evidence)
    assert torch.equal(found.A, V[:R]) and not found.B.any() and not found.needs_anchor


def literal_redistribution(shares: dict[str, list[float]], budget: int) -> dict[str, int]:
    """Paischer 2024, section 3.3: all shares in one list, sorted; the first Σr of them count for their layers."""
    everything = sorted(((share, name) for name, found in shares.items() for share in found), reverse=True)
    return {name: sum(n == name for _, n in everything[:budget]) for name in shares}


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_eva_redistributes_ranks_under_the_same_total(rho: float) -> None:
    ranks = {"a": 4, "b": 4, "c": 2}
    sites = [Site(name, "linear", (20, 20), rank, S) for name, rank in ranks.items()]
    shares = {name: torch.rand(20).sort(descending=True).values for name in ranks}
    shares["b"] = shares["b"] * 0.01  # explains little: others get its ranks
    evidence = {n: InputDirections(torch.eye(20), torch.ones(20), v, 100) for n, v in shares.items()}
    found = rw.inits.Eva(rho=rho).ranks(sites, evidence)
    offered = {name: shares[name][: round(rho * rank)].tolist() for name, rank in ranks.items()}
    assert found == literal_redistribution(offered, 10)
    assert sum(found.values()) == 10 and all(found[n] <= round(rho * ranks[n]) for n in ranks)
    assert (found == ranks) == (rho == 1.0)


def test_lora_one_takes_the_low_rank_step() -> None:
    G = torch.randn(7, 10)
    found = start(rw.inits.LoraOne(gamma=16.0), torch.randn(7, 10), ExactGradient(G))
    U, s, Vh = torch.linalg.svd(-G, full_matrices=False)
    B = U[:, :R] @ torch.diag(s[:R].sqrt()) / s[0].sqrt() / 16**0.5
    A = torch.diag(s[:R].sqrt()) @ Vh[:R] / s[0].sqrt() / 16**0.5
    same_pair(found, B, A)
    assert (product(found) * G).sum() < 0 and not found.needs_anchor
    scaled = start(rw.inits.LoraOne(gamma=16.0), torch.randn(7, 10), ExactGradient(1e3 * G))
    torch.testing.assert_close(product(scaled), product(found))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def batches() -> list[dict[str, Tensor]]:
    spectrum = 0.5 ** torch.arange(12.0)
    return [{"x": torch.randn(40, 12) * spectrum} for _ in range(3)]


@pytest.mark.parametrize("init", ["milora", "corda", {"name": "corda", "mode": "kpm"}, "eva"])
def test_the_model_starts_unchanged_and_learns(init: object, tmp_path: object) -> None:
    model, data = Chain(), batches()
    before = model(data[0]["x"]).detach()
    spec = rw.LoRA(rank=2, init=init, target_modules=["first", "second", "third"])  # type: ignore[arg-type]
    assert rw.LoRA.from_dict(spec.to_dict()) == spec
    rw.attach(model, spec, batches=data)
    assert torch.equal(model(data[0]["x"]), before)
    model(data[0]["x"]).square().mean().backward()
    assert all(p.grad is not None for p in rw.trainable_parameters(model))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    rw.save(model, tmp_path)  # type: ignore[arg-type]
    adapted = model(data[0]["x"])
    torch.testing.assert_close(rw.load(rw.detach(model), tmp_path)(data[0]["x"]), adapted)  # type: ignore[arg-type]


def test_eva_moves_ranks_between_the_sites_of_a_model() -> None:
    model, data = Chain(), [{"x": torch.randn(40, 12)} for _ in range(3)]
    with torch.no_grad():
        model.second.weight.copy_(torch.outer(torch.randn(16), torch.randn(16)))
        model.second.bias.zero_()  # what "third" sees lies in one direction, or nearly so
    spec = rw.LoRA(rank=2, alpha=4, init=rw.inits.Eva(rho=3), target_modules=["first", "second", "third"])
    rw.attach(model, spec, batches=data)
    found = {pair.name: pair for pair in rw.pairs(model)}
    assert sum(pair.A.shape[0] for pair in found.values()) == 6
    assert found["third"].A.shape[0] == 1
    for name, pair in found.items():
        assert pair.scale == 2.0, name  # α over the planned rank
        A = pair.A.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-5, rtol=0)


def test_a_site_without_ranks_gets_no_adapter() -> None:
    model = Chain()
    strong, weak = torch.full((4,), 0.25), torch.full((4,), 0.01)
    evidence = {
        "first": InputDirections(torch.eye(12)[:4], torch.ones(4), strong, 9),
        "second": InputDirections(torch.eye(16)[:4], torch.ones(4), weak, 9),
    }
    rw.attach(model, rw.LoRA(rank=2, init="eva", target_modules=["first", "second"]), evidence=evidence)
    assert [pair.name for pair in rw.pairs(model)] == ["first"] and rw.pairs(model)[0].A.shape == (4, 12)


def test_what_does_not_go_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    for init in ("eva", "corda"):
        with pytest.raises(SpecError, match=r"0: init '.*' needs input vectors"):
            rw.plan(model, rw.LoRA(rank=2, init=init, target_modules=["0", "1"]))
        with pytest.raises(EvidenceError, match="pass batches="):
            rw.attach(model, rw.LoRA(rank=2, init=init, target_modules=["1"]))
    with pytest.raises(SpecError, match="rho"):
        rw.inits.Eva(rho=0.5)
    with pytest.raises(SpecError, match="gamma"):
        rw.inits.LoraOne(gamma=0)
    narrow = rw.activations(model, [{"input": torch.randint(9, (40,))}], target_modules=["1"], rank=2)
    with pytest.raises(EvidenceError, match="rank=4"):
        rw.attach(model, rw.LoRA(rank=2, init="eva", target_modules=["1"]), evidence=narrow)
