"""merge: what it reports, what it refuses, and what a merged model refuses."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from zoo import fingerprint, left_as_it_was, perturb

import rankwise as rw
from rankwise.errors import AttachError, MergeError

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_the_report_says_what_rounding_swallowed(dtype: torch.dtype, size: float):
    base = model(dtype)
    adapted = rw.attach(copy.deepcopy(base), rw.LoRA(rank=4))
    perturb(adapted, size)
    changes = {p.name: p.layer.double().delta().dense().detach() for p in rw.pairs(adapted)}
    for pair in rw.pairs(adapted):
        pair.layer.float()
    report = rw.merge(adapted, most_lost=1.0)
    for name, change in changes.items():
        before, after = (
            base.get_submodule(name).weight.detach().double(),
            adapted.get_submodule(name).weight.detach().double(),
        )
        lost = float(((after - before) - change).norm() / change.norm())
        assert report.sites[name].change == pytest.approx(float(change.norm()), rel=1e-5)
        assert report.sites[name].relative_change == pytest.approx(float(change.norm() / before.norm()), rel=1e-5)
        # The report is computed in fp32, so of a change near fp32's own resolution it knows the loss roughly.
        assert report.sites[name].lost == pytest.approx(lost, rel=0.05, abs=1e-4 if size > 1e-4 else 2e-3)
    assert report.sites[report.worst].lost == max(site.lost for site in report.sites.values())
    assert f"{report.sites[report.worst].lost:.2%} at the worst ({report.worst})" in str(report)
    if dtype == torch.bfloat16 and size == 1e-5:
        assert report.sites[report.worst].lost > 0.5  # so small a change does not survive bf16


def test_a_merge_that_loses_most_of_the_change_is_refused_unless_told():
    adapted = rw.attach(model(torch.bfloat16), rw.LoRA(rank=4))
    perturb(adapted, 1e-5)
    with (
        left_as_it_was(adapted),
        pytest.raises(MergeError, match=r"^rounding to torch.bfloat16 would lose \d+% .*at most 70%.*most_lost=1.0"),
    ):
        rw.merge(adapted)
    with left_as_it_was(adapted), pytest.raises(MergeError, match=r"at most 1%"):
        rw.merge(adapted, keep_base=False, most_lost=0.01)
    assert rw.merge(adapted, most_lost=1.0).lost > 0.5


def test_a_layer_whose_change_is_below_rounding_does_not_stand_in_the_way():
    adapted = rw.attach(model(torch.bfloat16), rw.LoRA(rank=4))
    perturb(adapted, 0.05)
    with torch.no_grad():
        rw.pairs(adapted)[0].parameters[1].mul_(1e-4)
    report = rw.merge(adapted)
    assert report.worst == "0"
    assert report.sites["0"].lost > 0.5 > 0.1 > report.lost
    whole = sum((site.lost * site.change) ** 2 for site in report.sites.values()) ** 0.5
    assert report.lost == pytest.approx(whole / sum(site.change**2 for site in report.sites.values()) ** 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite(bad: float):
    adapted = rw.attach(model(), rw.LoRA(rank=4))
    perturb(adapted, 0.1)
    with torch.no_grad():
        adapted[2].weight[3, 3] = bad
    with left_as_it_was(adapted), pytest.raises(MergeError, match=r"^2: the base weight holds NaN or infinity"):
        rw.merge(adapted)


def test_a_sum_beyond_half_precision():
    adapted = rw.attach(model(torch.float16), rw.LoRA(rank=4))
    perturb(adapted, 300.0)
    with left_as_it_was(adapted), pytest.raises(MergeError, match=r"^0: the sum .* is beyond torch.float16; load"):
        rw.merge(adapted)


def test_an_adapter_that_changes_nothing_loses_nothing():
    adapted = rw.attach(model(), rw.LoRA(rank=4, init="pissa"))
    report = rw.merge(adapted)
    assert all((site.change, site.lost) == (0.0, 0.0) for site in report.sites.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite(bad: float):
    adapted = rw.attach(model(), rw.LoRA(rank=4))
    perturb(adapted, 0.1)
    with torch.no_grad():
        rw.pairs(adapted)[1].parameters[0][0, 0] = bad
    with left_as_it_was(adapted), pytest.raises(MergeError, match=r"^2: the adapter's change holds NaN or infinity"):
        rw.merge(adapted)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_a_weight_that_another_layer_shares():
    tied = rw.attach(Tied(), rw.LoRA(rank=2, target_modules=["embed"]))
    with (
        left_as_it_was(tied),
        pytest.raises(MergeError, match=r"^embed: its weight is shared by embed.weight, head.weight.*untie"),
    ):
        rw.merge(tied)


def test_a_layer_that_is_used_twice_is_merged_once():
    layer = nn.Linear(6, 6)
    shared = nn.Sequential(layer, nn.Tanh(), layer)
    rw.attach(shared, rw.LoRA(rank=2))
    perturb(shared, 0.5)
    x = torch.randn(3, 6)
    adapted = shared(x).detach()
    rw.merge(shared)
    torch.testing.assert_close(shared(x), adapted)
    rw.detach(shared)
    assert shared[0] is shared[2] is layer


def test_what_a_merged_model_refuses(tmp_path):
    merged = rw.attach(model(), rw.LoRA(rank=4))
    perturb(merged, 0.1)
    rw.merge(merged)
    with pytest.raises(MergeError, match=r"merged already: call rankwise.unmerge or rankwise.detach"):
        rw.merge(merged)
    refused = [
        lambda: rw.attach(merged, rw.LoRA(rank=4), name="second"),
        lambda: rw.save(merged, tmp_path / "x"),
        lambda: rw.save(merged, tmp_path / "x", name="default"),
        lambda: rw.pairs(merged, "default"),
        lambda: rw.activate(merged, "default"),
        lambda: rw.disabled(merged),
    ]
    for call in refused:
        with left_as_it_was(merged), pytest.raises(AttachError, match=r"this model is merged.*call rankwise.unmerge"):
            call()
    assert not (tmp_path / "x").exists()


def test_a_merged_model_is_detached_by_its_adapters_name_too():
    plain = model()
    before = fingerprint(plain)
    rw.attach(plain, rw.LoRA(rank=4), name="only")
    perturb(plain, 0.1)
    rw.merge(plain)
    rw.detach(plain, "only")
    assert fingerprint(plain) == before


def test_unmerge_of_a_model_that_is_not_merged():
    adapted = rw.attach(model(), rw.LoRA(rank=4))
    with left_as_it_was(adapted), pytest.raises(MergeError, match="not merged"):
        rw.unmerge(adapted)


def test_nothing_active():
    adapted = rw.attach(model(), rw.LoRA(rank=4), name="a")
    rw.attach(adapted, rw.LoRA(rank=4), name="b")
    rw.detach(adapted, "b")
    with left_as_it_was(adapted), pytest.raises(MergeError, match=r"no adapter is active.*rankwise.activate"):
        rw.merge(adapted)


def test_only_the_active_adapter_is_merged():
    plain = model()
    adapted = rw.attach(copy.deepcopy(plain), rw.LoRA(rank=4, target_modules=["0"]), name="a")
    perturb(adapted, 0.1, 1)
    expected = adapted(X).detach()
    rw.attach(adapted, rw.LoRA(rank=4), name="b")
    perturb(adapted, 0.1, 2)
    rw.activate(adapted, "a")
    report = rw.merge(adapted)
    assert list(report.sites) == ["0"]
    torch.testing.assert_close(adapted(X), expected)
    assert torch.equal(adapted[2].weight, plain[2].weight)


@pytest.mark.parametrize("anchor", ["frozen", "fold"])
@pytest.mark.parametrize("undo", [rw.unmerge, rw.detach])
def test_what_is_put_aside_follows_a_model_that_is_cast_or_moved(undo, anchor: str):
    """To another device likewise: the "meta" device stands for one."""
    for target in (torch.device("meta"), torch.bfloat16):
        plain = model()
        adapted = rw.attach(copy.deepcopy(plain), rw.LoRA(rank=4, init="pissa", anchor=anchor))
        perturb(adapted, 0.1)
        rw.merge(adapted)
        undo(adapted.to(target))
        weight = plain[0].weight.to(target)
        assert (adapted[0].weight.device, adapted[0].weight.dtype) == (weight.device, weight.dtype)
        if target == torch.bfloat16 and undo is rw.detach:
            assert torch.equal(adapted[0].weight, weight)
        assert {t.device for t in [*adapted.parameters(), *adapted.buffers()]} == {weight.device}


def test_a_folded_original_follows_the_model():
    plain = model()
    adapted = rw.attach(copy.deepcopy(plain), rw.LoRA(rank=4, init="pissa", anchor="fold")).bfloat16()
    with rw.disabled(adapted):
        assert torch.equal(adapted(X.bfloat16()), plain.bfloat16()(X.bfloat16()))
    rw.detach(adapted)
    assert torch.equal(adapted[0].weight, plain[0].weight)


def test_a_merged_model_survives_copying_and_comes_back_from_it():
    plain = model()
    before = fingerprint(plain)
    rw.attach(plain, rw.LoRA(rank=4, init="pissa"))
    perturb(plain, 0.1)
    adapted = plain(X).detach()
    rw.merge(plain)
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        torch.testing.assert_close(twin(X), adapted)
        assert torch.equal(rw.unmerge(twin)(X), adapted)
        rw.detach(twin)
        assert fingerprint(twin) == before
