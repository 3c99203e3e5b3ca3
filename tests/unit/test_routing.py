"""route: every row of a mixed batch gets what it would get alone, with its adapter active."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import DTYPES, LAYERS, TOLERANCE, Zoo, perturb, relative, zoo_and_inputs

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import AttachError, RoutingError
from rankwise.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")

# Ranks, scales, starts and variants that differ.
SPECS: dict[str, Any] = {
    "plain": rw.LoRA(rank=1, alpha=3, target_modules=list(LAYERS)),
    "anchored": rw.LoRA(rank=2, init="pissa", target_modules=list(LAYERS)),
    "stretched": rw.LoRA(rank=2, variant="dora", target_modules=list(LAYERS)),
    "pruned": rw.LoRA(rank=1, variant="adalora", target_modules=list(LAYERS)),
    "behind": rw.Bottleneck(width=2, target_modules=[name for name in LAYERS if "conv2d" not in name]),
    "elsewhere": rw.LoRA(rank=2, target_modules=["wide", "conv2d"]),
}
names_of_rows = st.lists(st.sampled_from([*SPECS, None]), min_size=3, max_size=3)


@cache
def routed_zoo(dtype: torch.dtype) -> tuple[Zoo, dict[str, Tensor]]:
    zoo, inputs = zoo_and_inputs(dtype)
    for name, spec in SPECS.items():
        rw.attach(zoo, spec, name=name)
        perturb(zoo)
    return zoo, inputs


def alone(model: nn.Module, name: str | None) -> Any:
    """The model as a row of its own has it."""
    if name is None:
        return rw.disabled(model)
    rw.activate(model, name)
    return nullcontext()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@settings(max_examples=12)
@given(rows=names_of_rows)
def test_each_row_is_what_it_is_alone(dtype: torch.dtype, rows: list[str | None]):
    zoo, inputs = routed_zoo(dtype)
    with rw.route(zoo, rows):
        mixed = zoo(**inputs).outputs
    for row, name in enumerate(rows):
        with alone(zoo, name):
            one = zoo(**{key: x[row : row + 1] for key, x in inputs.items()}).outputs
        for key, y in one.items():
            assert relative(mixed[key][row : row + 1], y) < TOLERANCE[dtype], (key, name)


@settings(max_examples=12)
@given(rows=names_of_rows.filter(any))
def test_gradients_are_those_of_a_step_with_the_adapter_s_rows_alone(rows: list[str | None]):
    zoo, inputs = routed_zoo(torch.float64)
    zoo.zero_grad()
    with rw.route(zoo, rows):
        outputs = zoo(**inputs).outputs
    sum(y.square().sum() for y in outputs.values()).backward()  # after the block
    found = {path: p.grad for path, p in zoo.named_parameters() if p.grad is not None}
    zoo.zero_grad()
    for name in {*rows} - {None}:
        rw.activate(zoo, name)
        own = [row for row, other in enumerate(rows) if other == name]
        outputs = zoo(**{key: x[own] for key, x in inputs.items()}).outputs
        sum(y.square().sum() for y in outputs.values()).backward()
    expected = {path: p.grad for path, p in zoo.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        torch.testing.assert_close(found[path], gradient, rtol=1e-9, atol=1e-9, msg=path)


def test_rows_without_an_adapter_are_the_pretrained_model_bit_for_bit():
    zoo, inputs = routed_zoo(torch.float32)
    inputs = {**inputs, "linear": inputs["linear"].index_fill(0, torch.tensor(1), torch.inf)}
    with rw.disabled(zoo):
        pretrained = zoo(**inputs).outputs
    with rw.route(zoo, ["plain", None, "stretched"]):
        mixed = zoo(**inputs).outputs
        with rw.disabled(zoo):
            inside = zoo(**inputs).outputs
    for key, y in pretrained.items():
        assert mixed[key][1].equal(y[1]) or mixed[key][1].isnan().equal(y[1].isnan())
        torch.testing.assert_close(inside[key], y, rtol=0, atol=0, equal_nan=True)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


NAMES = ("kaiming", "pissa", "dora")
ROWS = ["dora", None, "kaiming", "pissa", "kaiming"]


def routed_llama(dropout: float = 0.0) -> LlamaForCausalLM:
    model = llama()
    for name in NAMES:
        init, variant = ("kaiming", "dora") if name == "dora" else (name, "lora")
        rw.attach(model, rw.LoRA(rank=2, init=init, variant=variant, dropout=dropout), name=name)
        perturb(model, 0.3)
    return model


def ids() -> Tensor:
    return torch.randint(2, 32, (len(ROWS), 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache(beams: int):
    model = routed_llama().eval()
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones(1, 6).long()}
    answers = []
    for row, name in enumerate(ROWS):
        with alone(model, name):
            answers.append(model.generate(ids()[row : row + 1], **options)[0])
    options["attention_mask"] = torch.ones(len(ROWS), 6).long()
    with rw.route(model, [name for name in ROWS for _ in range(beams)]):
        mixed = model.generate(ids(), **options)
    assert len({tuple(answer.tolist()) for answer in answers}) > 2
    for answer, found in zip(answers, mixed, strict=True):
        assert found[: len(answer)].equal(answer)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_after_other_blocks(reentrant: bool, dropout: float):
    """Forwards that run again do so with the rows they ran with first: two routed ones and one that is not."""
    gradients = []
    for checkpointing in (False, True):
        model = routed_llama(dropout).double().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        batch = {"input_ids": ids(), "labels": ids()}
        torch.manual_seed(0)
        with rw.route(model, ROWS):
            first = model(**batch).loss
        plain = model(**batch).loss
        with rw.route(model, ROWS[::-1]):
            second = model(**batch).loss
        with rw.route(model, ["pissa"] * len(ROWS)):
            (first + 2 * plain + 3 * second).backward()
        gradients.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == sum(p.requires_grad for p in model.parameters())
    assert gradients[0].keys() == gradients[1].keys()
    for path, gradient in gradients[0].items():
        assert gradient.any()
        assert relative(gradients[1][path], gradient) < 1e-10, path


def test_what_is_trained():
    model = llama()
    for name in ("first", "frozen", "second"):
        rw.attach(model, rw.LoRA(rank=1), name=name)
    Adapted.of(model).trainable["frozen"] = False
    rw.activate(model, "second")

    def trained() -> set[str]:
        return {path.split(".adapters.")[1].split(".")[0] for path, p in model.named_parameters() if p.requires_grad}

    for rows in (["first", "frozen"], ["first", None]):
        with rw.route(model, rows):
            assert trained() == {"first", "second"}
        assert trained() == {"first", "second"}
    rw.activate(model, "frozen")
    assert not trained()


class Positions(nn.Module):
    """A sum of what rows share and what they do not, then tokens in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.token, self.flat = nn.Embedding(8, 6), nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1])[None])
        return self.flat(h.flatten(0, 1)).unflatten(0, x.shape)


def test_shared_positions_and_tokens_in_one_axis():
    model = Positions().double()
    for name in ("a", "b"):
        rw.attach(model, rw.LoRA(rank=2, target_modules=["position", "token", "flat"]), name=name)
        perturb(model)
    x, rows = torch.randint(9, (4, 5)), ["b", "a", None, "b"]
    with rw.route(model, rows):
        mixed = model(x)
    for row, name in enumerate(rows):
        with alone(model, name):
            assert relative(mixed[row : row + 1], model(x[row : row + 1])) < 1e-12


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Experts(nn.Module):
    """Each token goes to one expert, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        return torch.cat([expert(part) for expert, part in zip(self.experts, tokens.chunk(2), strict=True)])


class Table(nn.Module):
    """Positions [t] looked up without an axis for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position(torch.arange(x.shape[1]))


class Relative(nn.Module):
    """A product with something of as many rows as a sequence has positions."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.distance(x[0])


@pytest.mark.parametrize("length", [2, 4])
@pytest.mark.parametrize("cls", [Experts, Table, Relative])
def test_as_many_as_rows_but_not_rows(cls: type[nn.Module], length: int):
    model = cls()
    for name in ("a", "b"):
        rw.attach(model, rw.LoRA(rank=2, target_modules=r"experts\.\d|position|distance"), name=name)
    with pytest.raises(RoutingError, match="does not tell 2 rows apart"), rw.route(model, ["a", "b"]):
        model(torch.randn(2, length, 6))


def test_errors():
    model = routed_llama()
    two = ["dora", None]
    with pytest.raises(AttachError, match="did you mean 'kaiming'"), rw.route(model, ["kaimin"]):
        pass
    with pytest.raises(RoutingError, match="found none"), rw.route(model, []):
        pass
    with pytest.raises(RoutingError, match=r"the text 'dora': \['dora'\]"), rw.route(model, "dora"):
        pass
    with pytest.raises(RoutingError, match="given 2 rows, the batch has 5"), rw.route(model, two):
        model(ids())
    with pytest.raises(RoutingError, match="open already"), rw.route(model, two), rw.route(model, two):
        pass
    with rw.route(model, ROWS):  # nothing is left of the errors
        model(ids())
    with pytest.raises(AttachError, match="carries no adapter"), rw.route(llama(), two):
        pass
    rw.merge(model, most_lost=1)
    with pytest.raises(AttachError, match="merged"), rw.route(model, two):
        pass


def test_a_layer_that_does_not_tell_rows_apart():
    model = TimeFirst()
    for name in ("a", "b"):
        rw.attach(model, rw.LoRA(rank=2), name=name)
    with pytest.raises(RoutingError, match=r"^layer: \[5, 2, 6\] at this layer"), rw.route(model, ["a", "b"]):
        model(torch.randn(2, 5, 6))
    with rw.route(model, ["a", "a"]):  # one adapter for all
        mixed = model(torch.randn(2, 5, 6))
    assert mixed.shape == (2, 5, 6)


def test_tokens_of_their_own_and_a_head_that_is_tied_to_them():
    model = llama().double()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    for name, tokens in (("first", [3, 5]), ("second", [5, 7])):
        rw.attach(model, rw.LoRA(rank=1, trainable_token_indices=tokens), name=name)
        perturb(model)
    x, rows = torch.tensor([[3, 5, 7, 9]] * 3), ["second", None, "first"]
    with rw.route(model, rows):
        mixed = model(x).logits
    for row, name in enumerate(rows):
        with alone(model, name):
            assert relative(mixed[row : row + 1], model(x[:1]).logits) < 1e-12


@pytest.mark.parametrize("name", ["whole", "without"])
def test_modules_trained_whole_are_refused(name: str):
    model = llama()
    rw.attach(model, rw.LoRA(rank=1), name="without")
    rw.attach(model, rw.LoRA(rank=1, modules_to_save=["lm_head"]), name="whole")
    with pytest.raises(RoutingError, match=r"^lm_head: .*modules_to_save"), rw.route(model, [name, None]):
        pass


def test_a_start_that_the_base_took_in():
    model = TimeFirst()
    rw.attach(model, rw.LoRA(rank=2, init="pissa", anchor="fold"))
    with pytest.raises(RoutingError, match="anchor='fold'"), rw.route(model, ["default", None]):
        pass
    with rw.route(model, ["default"]):
        mixed = model(torch.ones(1, 2, 6))
    torch.testing.assert_close(mixed, model(torch.ones(1, 2, 6)))


def test_every_variant_is_tested():
    variants = {VARIANTS[name].cls for name in VARIANTS}
    assert variants == {type(spec.variant) for spec in SPECS.values()}
