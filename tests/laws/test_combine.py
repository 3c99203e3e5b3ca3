"""combine: each method equals its definition on dense matrices, and the errors that it states are the true ones."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.merge_utils import dare_linear, ties
from safetensors.torch import save_file
from tiny_llama import save_tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner
from zoo import LAYERS, perturb, relative, zoo_and_inputs

import rankwise as rw
from rankwise.adapter import Adapter, SiteAdapter
from rankwise.algebra.low_rank import LowRank
from rankwise.approximation import Approximation, fitted
from rankwise.cli import app
from rankwise.combinations import COMBINATIONS
from rankwise.combinations.sparse import Dare, DareTies
from rankwise.combining import combine
from rankwise.errors import BaseMismatch, ShapeMismatch, SpecError, UnsupportedAdapter
from rankwise.format.save_load import portable

SPEC = rw.LoRA(rank=1)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
weights = st.sampled_from([1.0, 0.5, -0.75, 2.0, 1e-3])
FACTORED = [name for name, method in COMBINATIONS.items() if method.cls.truncation != "needed"]


Mixture = list[tuple[dict[str, LowRank], float]]


@st.composite
def mixtures(draw, dtypes: Any = DTYPES) -> Mixture:
    """Up to four adapters on up to three sites, each with its own ranks (beyond the shape too), scales and sites."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = {
        f"block.{i}": (draw(st.integers(1, 12)), draw(st.integers(1, 12))) for i in range(draw(st.integers(1, 3)))
    }

    def change(out: int, into: int) -> LowRank:
        rank, dtype = draw(st.integers(1, 6)), draw(st.sampled_from(dtypes))
        B = torch.randn(out, rank, generator=generator).to(dtype)
        A = torch.randn(rank, into, generator=generator).to(dtype)
        return LowRank(B, A, draw(st.sampled_from([1.0, 2.0, 1e-3, 16 / 8**0.5])))

    parts = []
    for _ in range(draw(st.integers(1, 4))):
        present = draw(st.lists(st.sampled_from(list(shapes)), min_size=1, unique=True))
        parts.append(({path: change(*shapes[path]) for path in present}, draw(weights)))
    return parts


def adapter_of(deltas: dict[str, LowRank], **others: Any) -> Adapter:
    return Adapter(
        SPEC, {path: SiteAdapter("linear", delta) for path, delta in deltas.items()}, tuple(deltas), **others
    )


def combined_of(mixture: Mixture, *arguments: Any, **options: Any) -> Approximation:
    return combine([(adapter_of(deltas), weight) for deltas, weight in mixture], *arguments, **options)


def dense(delta: LowRank) -> Tensor:
    return delta.scale * delta.B.double() @ delta.A.double()


def changes(mixture: Mixture) -> dict[str, list[Tensor]]:
    """Site → the adapters' weighted changes in fp64."""
    sites = {path for deltas, _ in mixture for path in deltas}
    return {path: [w * dense(deltas[path]) for deltas, w in mixture if path in deltas] for path in sites}


def states_the_truth(combined: Approximation, targets: dict[str, Tensor]) -> None:
    """The stated errors are those against the targets, site by site and in all."""
    found = {path: dense(site.delta) for path, site in combined.adapter.sites.items()}
    assert found.keys() == targets.keys() == combined.errors.keys()
    for path, target in targets.items():
        assert combined.errors[path] == pytest.approx(relative(found[path], target), abs=1e-5)
    lost = sum(float((found[path] - target).square().sum()) for path, target in targets.items())
    size = sum(float(target.square().sum()) for target in targets.values())
    assert combined.error == pytest.approx(math.sqrt(lost / size), abs=1e-5)


# ------------------------------------------------------------------------------------------------------- by factors


@given(mixtures())
def test_exact_is_the_weighted_sum(parts: Mixture):
    combined = combined_of(parts)
    targets = {path: sum(terms) for path, terms in changes(parts).items()}
    for path, terms in changes(parts).items():
        gap = (dense(combined.adapter.sites[path].delta) - targets[path]).norm()
        assert gap <= 1e-6 * sum(term.norm() for term in terms)  # of the terms: they may cancel
    assert combined.error == 0.0 or combined.error < 1e-6
    for site in combined.adapter.sites.values():
        assert site.delta.scale == 1.0 and site.delta.rank <= min(site.delta.shape)


@given(mixtures([torch.float32, torch.float64]), st.integers(1, 8), st.sampled_from(["svd", "task-arithmetic"]))
def test_svd_is_the_nearest_of_its_rank(parts: Mixture, rank: int, method: str):
    targets = {path: sum(terms) for path, terms in changes(parts).items()}
    combined = combined_of(parts, method, rank=rank)
    states_the_truth(combined, targets)
    for path, target in targets.items():
        optimum = torch.linalg.svdvals(target)[rank:].norm() / target.norm()
        assert combined.errors[path] == pytest.approx(float(optimum), abs=1e-5)
        assert combined.adapter.sites[path].delta.rank == min(rank, combined_of(parts).adapter.sites[path].delta.rank)


@given(mixtures([torch.float32, torch.float64]), st.sampled_from([0.0, 0.01, 0.3, 0.9]))
def test_an_error_is_kept_with_the_fewest_ranks(parts: Mixture, error: float):
    targets = {path: sum(terms) for path, terms in changes(parts).items()}
    combined = combined_of(parts, "svd", error=error)
    states_the_truth(combined, targets)
    for path, target in targets.items():
        S = torch.linalg.svdvals(target)
        tails = [float(S[k:].norm() / S.norm()) for k in range(len(S) + 1)]
        rank = combined.adapter.sites[path].delta.rank
        assert tails[rank] <= error + 1e-6
        assert rank == 1 or tails[rank - 1] > error - 1e-6


def knots_by_hand(terms: list[Tensor], density: float) -> Tensor:
    """KnOTS-TIES on dense matrices: one SVD of them side by side, then PEFT's TIES on the coordinates."""
    U, S, Vh = torch.linalg.svd(torch.cat(terms, 1), full_matrices=False)
    real = S.max() * torch.finfo(torch.float32).eps < S
    coordinates = list((S[real, None] * Vh[real]).split(terms[0].shape[1], 1))
    return U[:, real] @ ties(coordinates, torch.ones(len(terms), dtype=torch.float64), density)


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater:UserWarning")
@given(mixtures([torch.float64]), st.sampled_from([0.2, 0.5, 1.0]))
def test_knots_is_ties_in_the_common_basis(parts: Mixture, density: float):
    combined = combined_of(parts, {"name": "knots", "density": density})
    for path, terms in changes(parts).items():
        if max(int(density * combined_coordinates(terms)), 1) != int(density * combined_coordinates(terms)):
            continue  # PEFT keeps nothing of a matrix of so few entries
        expected = knots_by_hand(terms, density)
        assert (dense(combined.adapter.sites[path].delta) - expected).norm() <= 1e-9 * sum(t.norm() for t in terms)


def combined_coordinates(terms: list[Tensor]) -> int:
    return int(torch.linalg.matrix_rank(torch.cat(terms, 1))) * terms[0].shape[1]


# ---------------------------------------------------------------------------------------------------- entry by entry


def ties_by_hand(terms: list[Tensor], density: float) -> Tensor:
    """Algorithm 1 of the paper, entry by entry."""
    kept = []
    for term in terms:
        order = sorted(range(term.numel()), key=lambda i: -abs(float(term.flatten()[i])))
        largest = set(order[: max(int(density * term.numel()), 1)])
        kept.append([float(x) if i in largest else 0.0 for i, x in enumerate(term.flatten())])
    merged = []
    for entries in zip(*kept, strict=True):
        sign = 1.0 if sum(entries) >= 0 else -1.0
        agreeing = [x for x in entries if x * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view(terms[0].shape)


@given(mixtures([torch.float64]), st.sampled_from([0.1, 0.2, 0.5, 1.0]), st.integers(1, 12))
def test_ties_is_the_papers_algorithm(parts: Mixture, density: float, rank: int):
    combined = combined_of(parts, {"name": "ties", "density": density}, rank=rank)
    states_the_truth(combined, {path: ties_by_hand(terms, density) for path, terms in changes(parts).items()})


def test_ties_with_equal_weights_is_pefts_on_the_whole_changes():
    generator = torch.Generator().manual_seed(1)
    pairs = [
        LowRank(torch.randn(30, 3, generator=generator), torch.randn(3, 20, generator=generator)) for _ in range(3)
    ]
    parts = [(adapter_of({"proj": pair}), 0.7) for pair in pairs]
    combined = combine(parts, {"name": "ties", "density": 0.3}, rank=20)
    expected = ties([pair.dense() for pair in pairs], torch.full((3,), 0.7), 0.3)
    assert relative(dense(combined.adapter.sites["proj"].delta), expected) < 1e-6


@given(mixtures([torch.float32]), st.integers(0, 3))
def test_dare_keeps_entries_scaled_up_or_drops_them(parts: Mixture, seed: int):
    by_site = changes(parts)
    for path, terms in by_site.items():
        stacked = torch.stack(terms)
        generator = torch.Generator().manual_seed(seed)
        dropped = Dare(0.4)._dropped(stacked, generator)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], stacked[kept] / 0.4)
        assert path in by_site
    full = combined_of(parts, {"name": "dare", "density": 1.0}, rank=12)
    states_the_truth(full, {path: sum(terms) for path, terms in by_site.items()})


def test_dare_is_unbiased_and_drops_what_peft_would():
    delta = LowRank(torch.ones(200, 1), torch.ones(1, 300))
    generator = torch.Generator().manual_seed(0)
    dropped = Dare(0.25)([delta, delta], generator)
    assert isinstance(dropped, Tensor)
    assert set(dropped.unique().tolist()) == {0.0, 4.0, 8.0}
    assert float(dropped.mean()) == pytest.approx(2.0, abs=0.05)
    torch.manual_seed(0)
    peft = dare_linear([delta.dense(), delta.dense()], torch.ones(2), 0.25)
    assert float(dropped.std()) == pytest.approx(float(peft.std()), rel=0.02)
    signed = DareTies(0.25)([delta, -2.0 * delta], generator)
    assert isinstance(signed, Tensor)
    assert set(signed.unique().tolist()) == {-8.0, 0.0, 4.0}  # the larger one wins where both are kept


@pytest.mark.parametrize("method", list(COMBINATIONS))
def test_the_same_again_whatever_the_order_of_sites_and_the_global_seed(method: str):
    generator = torch.Generator().manual_seed(5)

    def part() -> dict[str, LowRank]:
        shapes = {"a.x": (200, 150), "b.y": (30, 40)}
        return {
            path: LowRank(torch.randn(out, 3, generator=generator), torch.randn(3, into, generator=generator))
            for path, (out, into) in shapes.items()
        }

    first, second = part(), part()
    rank = None if COMBINATIONS[method].cls.truncation == "none" else 4
    combined = []
    for turned in (False, True):
        torch.manual_seed(int(turned))
        sites = [dict(reversed(s.items())) if turned else s for s in (first, second)]
        combined.append(combine([(adapter_of(s), 0.5) for s in sites], method, rank=rank))
    for path, site in combined[0].adapter.sites.items():
        other = combined[1].adapter.sites[path].delta
        assert torch.equal(site.delta.A, other.A) and torch.equal(site.delta.B, other.B)


@pytest.mark.parametrize("shape", [(30, 20), (400, 300), (300, 500)], ids=str)
@pytest.mark.parametrize("limit", [{"rank": 5}, {"error": 0.5}, {"error": 0.02}], ids=str)
def test_a_dense_change_is_fitted_and_its_error_is_the_true_one(shape: tuple[int, int], limit: dict[str, Any]):
    generator = torch.Generator().manual_seed(2)
    U, V = (torch.linalg.qr(torch.randn(n, min(shape), generator=generator)).Q for n in shape)
    S = 0.9 ** torch.arange(min(shape))
    matrix = U * S @ V.T
    fit = fitted(matrix, torch.Generator().manual_seed(0), **limit)
    assert fit.error == pytest.approx(relative(fit.delta.dense(), matrix), abs=1e-6)
    tails = [float(S[k:].norm() / S.norm()) for k in range(len(S) + 1)]
    if "rank" in limit:
        assert fit.error == pytest.approx(tails[5], rel=1e-3)
    else:
        assert fit.error <= limit["error"]
        assert tails[fit.delta.rank - 1] > limit["error"] * 0.99


# ------------------------------------------------------------------------------------------- DoRA, through the base


def moved(variant: str, seed: int, **spec: Any) -> tuple[nn.Module, Adapter]:
    """A zoo with a trained adapter on it, and the adapter as a value."""
    zoo, _ = zoo_and_inputs(torch.float64)
    rw.attach(zoo, rw.LoRA(**{"rank": 2, "variant": variant, "target_modules": list(LAYERS)} | spec))
    perturb(zoo, 0.2, seed)
    return zoo, portable(zoo)


def folded_change(zoo: nn.Module) -> dict[str, Tensor]:
    """What the merged weights are away from the base, as matrices."""
    from rankwise.layers.kinds import kind_of

    def weights() -> dict[str, Tensor]:
        return {name: kind_of(zoo.get_submodule(name)).weight(zoo.get_submodule(name)).clone() for name in LAYERS}

    rw.merge(zoo)
    merged = weights()
    rw.unmerge(zoo)
    return {name: merged[name] - weight for name, weight in weights().items()}


@pytest.mark.parametrize("method", ["svd", "ties", "knots"])
def test_dora_is_combined_through_the_base(method: str):
    """Every kind of layer; DoRA, an anchored LoRA and AdaLoRA in one mixture."""
    trained = [moved("dora", 1), moved("lora", 2, init="pissa", scaling="rslora"), moved("adalora", 3)]
    zoos, adapters = zip(*trained, strict=True)
    base, _ = zoo_and_inputs(torch.float64)
    parts = list(zip(adapters, (0.5, -1.0, 0.25), strict=True))
    deltas = [folded_change(zoo) for zoo in zoos]
    terms = {name: [w * delta[name] for (_, w), delta in zip(parts, deltas, strict=True)] for name in LAYERS}
    define = {
        "svd": sum,
        "ties": lambda t: ties_by_hand(t, 0.2),
        "knots": lambda t: knots_by_hand(t, 0.2),
    }[method]
    states_the_truth(combine(parts, method, rank=3, base=base), {name: define(t) for name, t in terms.items()})


def test_a_base_from_files_is_the_same_base(tmp_path: Path):
    _, adapter = moved("dora", 1)
    base, _ = zoo_and_inputs(torch.float64)
    tensors = {key: tensor.contiguous() for key, tensor in base.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    combined = [
        combine([(adapter, 1.0)], "svd", rank=2, base=source)
        for source in (base, tensors, tmp_path, tmp_path / "model.safetensors")
    ]
    for other in combined[1:]:
        assert other.errors == combined[0].errors


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_square_weights_of_a_conv1d_are_told_by_the_others_biases(tmp_path: Path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=16))
    rw.attach(model, rw.LoRA(rank=2, variant="dora", target_modules=["attn.c_proj"]))
    perturb(model, 0.3)
    rw.save(model, tmp_path / "adapter")
    rw.detach(model)
    model.save_pretrained(tmp_path / "base")
    parts = [(rw.read(tmp_path / "adapter"), 1.0)]
    expected, found = (combine(parts, "svd", rank=8, base=base) for base in (model, tmp_path / "base"))
    path = "transformer.h.0.attn.c_proj"
    assert relative(dense(found.adapter.sites[path].delta), dense(expected.adapter.sites[path].delta)) < 1e-5


def test_dora_needs_its_own_base():
    _, adapter = moved("dora", 1)
    with pytest.raises(UnsupportedAdapter, match=r"use_dora .* expected base="):
        combine([(adapter, 1.0)], "svd", rank=2)
    base, _ = zoo_and_inputs(torch.float64)
    with pytest.raises(UnsupportedAdapter, match="of full rank"):
        combine([(adapter, 1.0)], base=base)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(1.0)
    with pytest.raises(BaseMismatch, match="differ by"):
        combine([(adapter, 1.0)], "svd", rank=2, base=base)
    with pytest.raises(BaseMismatch, match="has no 'linear'"):
        combine([(adapter, 1.0)], "svd", rank=2, base=nn.Sequential(nn.Linear(2, 2)))
    small = nn.Module()
    small.linear = nn.Linear(3, 3)
    with pytest.raises(ShapeMismatch, match="is 3 × 3 and the adapter's change 10 × 12"):
        combine([(adapter, 1.0)], "svd", rank=2, base=small)


# ------------------------------------------------------------------------------------------------ as one adapter again


@pytest.mark.parametrize("limit", [{}, {"rank": 3}], ids=["exact", "svd"])
def test_the_combination_does_to_a_model_what_its_parts_do(limit: dict[str, int], tmp_path: Path):
    """Different sites, ranks and kinds of layers; through files."""
    zoo, inputs = zoo_and_inputs()
    base = copy.deepcopy(zoo)
    rw.attach(
        zoo, rw.LoRA(rank=2, init="pissa", target_modules=["linear", "conv1d", "conv2d_grouped", "embedding"]), name="a"
    )
    rw.attach(zoo, rw.LoRA(rank=1, alpha=3, target_modules=["linear", "wide", "conv2d_strided"]), name="b")
    for seed, name in enumerate("ab"):
        rw.activate(zoo, name)
        perturb(zoo, 0.3, seed)
        rw.save(zoo, tmp_path / name)
    parts = [(rw.read(tmp_path / name), 1.0) for name in "ab"]
    combined = combine(parts, "svd" if limit else "exact", **limit)
    rw.write(combined.adapter, tmp_path / "both")
    rw.activate(zoo, ["a", "b"])
    rw.load(base, tmp_path / "both")
    found, expected = base(**inputs).outputs, zoo(**inputs).outputs
    for name, y in expected.items():
        if combined.errors.get(name, 0.0) < 1e-6:
            assert relative(found[name], y) < 1e-5, name
    assert set(rw.read(tmp_path / "both").sites) == {
        "linear",
        "conv1d",
        "conv2d_grouped",
        "embedding",
        "wide",
        "conv2d_strided",
    }


def test_targets_that_no_list_can_name_become_a_regular_expression():
    delta = LowRank(torch.ones(2, 1), torch.ones(1, 2))
    site = SiteAdapter("linear", delta)
    a = Adapter(rw.LoRA(rank=1), {"fc": site}, "fc")
    b = Adapter(rw.LoRA(rank=1), {"layers.0.fc": site}, ("0.fc",))
    assert combine([(a, 1.0), (b, 1.0)]).adapter.targets == r"fc|layers\.0\.fc"
    assert combine([(b, 1.0), (b, 1.0)]).adapter.targets == ("0.fc",)


def test_modules_trained_whole_are_combined_through_the_base():
    torch.manual_seed(0)
    base = {"head.weight": torch.randn(3, 4)}
    heads = [base["head.weight"] + torch.randn(3, 4) for _ in range(2)]
    site = SiteAdapter("linear", LowRank(torch.ones(2, 1), torch.ones(1, 2)))
    adapters = [
        Adapter(rw.LoRA(rank=1, modules_to_save=["head"]), {"proj": site}, ("proj",), saved={"head.weight": head})
        for head in heads
    ]
    combined = combine([(adapters[0], 0.3), (adapters[1], -2.0)], base=base).adapter
    expected = base["head.weight"] + 0.3 * (heads[0] - base["head.weight"]) - 2 * (heads[1] - base["head.weight"])
    torch.testing.assert_close(combined.saved["head.weight"], expected)
    assert combined.spec.modules_to_save == ("head",)
    mean = combine([(adapters[0], 0.5), (adapters[1], 0.5)]).adapter  # of which the base is no part
    torch.testing.assert_close(mean.saved["head.weight"], (heads[0] + heads[1]) / 2)
    with pytest.raises(UnsupportedAdapter, match=r"head\.weight: is trained whole"):
        combine([(adapters[0], 0.5), (adapters[1], 0.6)])
    with pytest.raises(ShapeMismatch, match="one base and task"):
        combine([(adapters[0], 0.5)], base={"head.weight": torch.randn(5, 4)})


# ------------------------------------------------------------------------------------------------------------ refusals


def one(shape: tuple[int, int] = (2, 2), **others: Any) -> Adapter:
    return adapter_of({"proj": LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1]))}, **others)


@pytest.mark.parametrize(
    ("parts", "options", "error", "says"),
    [
        ([], {}, SpecError, "at least one adapter"),
        ([(one(), 0.0)], {}, SpecError, "at least one adapter"),
        ([(one(), math.nan)], {}, SpecError, "finite number"),
        ([(one(), 1.0)], {"method": "tie"}, SpecError, "did you mean 'ties'"),
        ([(one(), 1.0)], {"method": {"name": "ties", "density": 0.0}}, SpecError, "density above 0"),
        ([(one(), 1.0)], {"method": {"name": "dare", "density": 1.5}}, SpecError, "density above 0"),
        ([(one(), 1.0)], {"method": "svd"}, SpecError, "expected a rank or an error"),
        ([(one(), 1.0)], {"method": "exact", "rank": 1}, SpecError, "keeps all ranks"),
        ([(one(), 1.0)], {"method": "svd", "rank": 1, "error": 0.1}, SpecError, "leave one out"),
        ([(one(), 1.0)], {"method": "svd", "rank": 0}, SpecError, "at least 1"),
        ([(one(), 1.0)], {"method": "svd", "error": 1.0}, SpecError, "below 1"),
        ([(one(), 1.0), (one((3, 2)), 1.0)], {}, ShapeMismatch, "adapters of one base"),
        (
            [(one(base_probe={"proj": (1.0,) * 16}), 1.0), (one(base_probe={"proj": (2.0,) * 16}), 1.0)],
            {},
            BaseMismatch,
            "adapters of one base",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(parts: Any, options: Any, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        combine(parts, **options)


@pytest.mark.parametrize("method", list(COMBINATIONS))
def test_adapters_that_change_nothing_make_one_that_changes_nothing(method: str):
    zero = adapter_of({"proj": LowRank(torch.zeros(3, 2), torch.ones(2, 4))})
    rank = None if COMBINATIONS[method].cls.truncation == "none" else 1
    combined = combine([(zero, 1.0), (zero, 0.5)], method, rank=rank)
    assert not dense(combined.adapter.sites["proj"].delta).any()
    assert combined.errors == {"proj": 0.0} and combined.error == 0.0


def test_changes_that_cancel_leave_nothing():
    for method, rank in (("exact", None), ("svd", 1)):
        combined = combine([(one(), 1.0), (one(), -1.0)], method, rank=rank)
        assert float(dense(combined.adapter.sites["proj"].delta).norm()) < 1e-6


@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
def test_pefts_own_sum_and_svd_are_exact_and_svd(tmp_path: Path):
    """Of directories that PEFT wrote: its "cat" and its "svd" add the changes themselves, each with its scale."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 9)), LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=7, use_rslora=True, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, selected_adapters=["default", "second"])
    parts = [(rw.read(tmp_path), 0.7), (rw.read(tmp_path / "second"), 1.3)]
    layer = model.base_model.model[0]
    for kind, method, rank in (("cat", "exact", None), ("svd", "svd", 3)):
        model.add_weighted_adapter(["default", "second"], [0.7, 1.3], kind, combination_type=kind, svd_rank=rank)
        expected = layer.get_delta_weight(kind).detach()
        assert relative(combine(parts, method, rank=rank).adapter.sites["0"].delta.dense(), expected) < 1e-5


# ----------------------------------------------------------------------------------------------- on the command line


def test_the_command_combines_directories_and_loads_the_base_where_it_is_needed(tmp_path: Path):
    save_tiny_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for seed, (name, variant) in enumerate({"plain": "lora", "turned": "dora"}.items()):
        rw.attach(model, rw.LoRA(rank=2, variant=variant), name=name)
        perturb(model, 0.1, seed)
        rw.save(model, tmp_path / name, name=name)
    folders, out = [str(tmp_path / name) for name in ("plain", "turned")], tmp_path / "out"
    options = ["--weight", "0.5", "--weight", "-1", "--method", "svd", "--rank", "3", "--out", str(out)]
    done = CliRunner().invoke(app, ["combine", *folders, *options, "--base", str(tmp_path / "base")])
    assert done.exit_code == 0, done.output
    parts = list(zip(map(rw.read, folders), (0.5, -1.0), strict=True))
    expected = combine(parts, "svd", rank=3, base=model)
    assert f"{expected.error:.2%}" in done.output
    found = rw.read(out)
    for path, site in expected.adapter.sites.items():
        torch.testing.assert_close(dense(found.sites[path].delta), dense(site.delta), rtol=1e-5, atol=1e-6)
    again = CliRunner().invoke(app, ["combine", *folders, *options])
    assert again.exit_code == 2 and "new or empty directory" in again.output
    refused = CliRunner().invoke(app, ["combine", *folders, "--weight", "1", "--out", str(tmp_path / "other")])
    assert refused.exit_code == 2 and "one for each of the 2 adapters" in refused.output
    spread = ["--method", "{name: ties, density: 0.5}", "--error", "0.5", "--out", str(tmp_path / "other")]
    assert CliRunner().invoke(app, ["combine", folders[0], *spread]).exit_code == 0
    broken = CliRunner().invoke(app, ["combine", folders[0], "--method", "{name: ties", "--out", str(tmp_path / "new")])
    assert broken.exit_code == 2 and "a mapping in YAML" in broken.output
