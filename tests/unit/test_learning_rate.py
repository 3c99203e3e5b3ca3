"""`learning_rate: auto`: the rules in closed form, which of them make a guess, and the probe that leaves no trace."""

import hashlib
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankwise as rw
from rankwise.errors import Diverged, RecipeError
from rankwise.methods import resolve
from rankwise.optim import OPTIMIZERS
from rankwise.train.learning_rate import rules
from rankwise.train.learning_rate.choice import LEAST_STEPS, MOST_RATES, MOST_STEPS, SHARE, Search, _parts, probe_length
from rankwise.train.learning_rate.guess import first_guess
from rankwise.train.learning_rate.probe import Probe, restored
from rankwise.train.learning_rate.rules import Rule, product
from rankwise.train.trainer.variant_callback import training_hooks

# ---------------------------------------------------------------------------------------------------------------- rules


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.1, 64.0))
def test_how_the_rate_falls_with_the_rank_is_the_scales_formula(r, other, alpha):
    def ratio(scale):
        return rules.pair_scale(other, scale(other)).factor / rules.pair_scale(r, scale(r)).factor

    assert ratio(lambda rank: alpha / rank) == pytest.approx(1.0)
    assert ratio(lambda rank: alpha / rank**0.5) == pytest.approx((other / r) ** -0.25)
    assert ratio(lambda rank: alpha) == pytest.approx((other / r) ** -0.5)


@given(st.floats(1.01, 16.0), st.integers(1, 64), st.floats(0.1, 16.0))
def test_a_scale_q_times_as_large_is_what_rates_root_q_times_as_large_are(q, rank, scale):
    """s BA with s → qs is s B'A' with B' = √q B, A' = √q A, whose steps are √q times those of B and A."""
    assert rules.pair_scale(rank, q * scale).factor * q**0.5 == pytest.approx(rules.pair_scale(rank, scale).factor)


def test_full_fine_tunings_rate():
    assert rules.full_fine_tuning(2000).factor == pytest.approx(5e-5)
    assert rules.full_fine_tuning(500).factor == pytest.approx(5e-5 * 4**0.781)


def test_loras_rate_over_it():
    assert [rules.lora_over_full(steps).factor for steps in (1, 99, 100, 10_000)] == [15, 15, 10, 10]


def test_an_anchored_start_moves_the_weight_as_far_as_full_fine_tuning_does():
    """Against the step itself: random signs for Adam's first direction, its size the root mean square over entries."""
    generator = torch.Generator().manual_seed(0)
    rank, scale, eta = 8, 2.0, 1e-3
    A, B = 0.3 * torch.randn(rank, 400, generator=generator), 0.7 * torch.randn(300, rank, generator=generator)
    signs_A, signs_B = (torch.randn(part.shape, generator=generator).sign() for part in (A, B))
    rate = eta * rules.anchored_start(rank, scale, 0.3, 0.7).factor
    step = scale * rate * (B @ signs_A + signs_B @ A)
    assert float(step.square().mean().sqrt()) == pytest.approx(eta, rel=0.1)


def test_lora_plus_keeps_the_geometric_mean():
    rate = rules.faster_B(16.0).factor
    assert (rate * 16.0 * rate) ** 0.5 == pytest.approx(1.0)


def test_a_distance_is_the_optimizers_own_where_it_was_measured():
    assert rules.distance(0.03, 576).factor * rules.distance_rank(8).factor == pytest.approx(0.03)
    assert rules.distance_rank(1).factor == pytest.approx(2.0)
    assert rules.distance(0.03, 1152).factor == pytest.approx(0.03 * 2**-0.781)


# ---------------------------------------------------------------------------------------------------------------- guess


def adapted(init="kaiming", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.BatchNorm1d(32), nn.Linear(32, 8))
    batches = [torch.randn(5, 16) for _ in range(3)]
    return rw.attach(model, rw.LoRA(rank=4, init=init, **options), batches=batches, loss=squares)


def squares(model, batch):
    return (model(batch) - 1.0).square().mean()


def guessed(model, optimizer="adamw", steps=50):
    choice = resolve(OPTIMIZERS, optimizer, "optimizer")
    method = OPTIMIZERS[optimizer if isinstance(optimizer, str) else optimizer["name"]]
    sites = [pair.layer.site for pair in rw.pairs(model)]
    return first_guess(model, sites, method, lambda rate: choice(model, rate), steps)


FULL = 5e-5 * (2000 / 24) ** 0.781  # the median of 16 and 32 inputs


def test_the_guess_for_plain_lora():
    assert product(guessed(adapted())) == pytest.approx(15 * FULL)
    assert product(guessed(adapted(), steps=500)) == pytest.approx(10 * FULL)


def test_the_guess_for_loras_with_a_rate_of_its_own_for_B():
    assert product(guessed(adapted(), {"name": "lora-plus", "ratio": 4.0})) == pytest.approx(15 * FULL / 2)


def test_the_guess_for_a_start_of_its_own_size():
    model = adapted("lora-ga", scaling="rslora")
    start = rw.pairs(model)
    a, b = (
        math.prod(float(half.detach().square().mean().sqrt()) for half in halves) ** 0.5
        for halves in ([pair.A for pair in start], [pair.B for pair in start])
    )
    reach = start[0].scale * 4**0.5 * math.hypot(a, b)
    assert product(guessed(model)) == pytest.approx(FULL / reach)


@pytest.mark.parametrize("optimizer", ["lora-pro", "loft"])
@pytest.mark.parametrize("init", ["kaiming", "lora-ga"])
def test_the_guess_for_what_moves_the_weight_as_full_fine_tuning_does(optimizer, init):
    assert product(guessed(adapted(init), optimizer)) == pytest.approx(FULL)


@pytest.mark.parametrize("optimizer", [name for name, row in OPTIMIZERS.items() if row.rate_unit == "distance"])
def test_the_guess_for_a_distance_does_not_depend_on_the_start(optimizer):
    expected = OPTIMIZERS[optimizer].learning_rate * (576 / 24) ** 0.781 * 2 ** (1 / 3)
    for init in ("kaiming", "lora-ga"):
        assert product(guessed(adapted(init), optimizer)) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------- probe


def state(model):
    """A hash of every tensor, mode, flag and random state that training could change.

    But for Python's own random state, which beartype draws from where it looks into lists.
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.requires_grad} {tensor.grad is None} {tensor.data_ptr()}".encode())
        digest.update(tensor.detach().numpy().tobytes())
    digest.update(repr([(name, module.training) for name, module in model.named_modules()]).encode())
    digest.update(np.random.get_state()[1].tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def probe(model, optimizer="adamw", steps=4, **options):
    choice = resolve(OPTIMIZERS, optimizer, "optimizer")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(6, 16, generator=generator) for _ in range(2 * steps + 2)]
    parts = [batches[2 * step : 2 * step + 2] for step in range(steps)]
    return Probe(model, parts, batches[-2:], squares, lambda rate: choice(model, rate), **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "spec",
    [{}, {"init": "lora-ga"}, {"dropout": 0.3}, {"variant": "dora"}, {"modules_to_save": ["2", "3"]}],
    ids=["plain", "lora-ga", "dropout", "dora", "whole-modules"],
)
def test_a_probe_leaves_no_trace(optimizer, spec):
    spec = {"target_modules": ["0"]} | spec
    model = adapted(**spec).train()
    model[1].eval()
    before = state(model)
    first = probe(model, optimizer)
    loss = first(1e-2)
    assert state(model) == before
    assert first(1e-2) == loss  # the same start, batches and dropout
    assert first(1e-3) != loss
    assert state(model) == before


def test_a_probe_of_adalora_leaves_no_trace():
    model = adapted(variant={"name": "adalora", "t_initial": 1, "t_final": 2, "delta_t": 1}, target_modules=["0", "3"])
    (hook,) = training_hooks(model, 8)
    before, ranks = state(model), []

    def before_step(number):
        hook.before_step(number)
        ranks.append(hook.total_rank)

    probe(model, before_step=before_step, steps=6)(1e-2)
    assert ranks[0] > ranks[-1]  # it has pruned
    assert state(model) == before


def test_a_probe_that_diverges_leaves_no_trace():
    model = adapted()
    before = state(model)
    with pytest.raises(Diverged, match=r"a probe of learning rate 1e\+30: expected a finite loss, found (inf|nan)"):
        probe(model)(1e30)
    assert state(model) == before


def test_every_source_of_random_numbers_goes_on_as_before():
    model = nn.Linear(2, 2)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with restored(model):
        drawn = random.random(), np.random.rand(), float(torch.rand(1))
    assert len(set(drawn)) == 3 and random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_buffer_that_a_forward_replaces_is_put_back():
    model = adapted()
    buffer = model[2].running_mean
    with restored(model):
        model[2].running_mean = torch.ones(32)
    assert model[2].running_mean is buffer


def test_a_probe_is_the_steps_that_training_takes():
    """Against a plain loop: averaged batches, clipping, AdamW at a constant rate; no dropout where it is judged."""
    rate, clip = 3e-3, 0.05
    found = probe(adapted(target_modules=["0", "3"]), steps=3, max_grad_norm=clip)(rate)
    model = adapted(target_modules=["0", "3"]).train()
    steps = probe(model, steps=3)
    trained = rw.trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    for one, two in steps.steps:
        optimizer.zero_grad()
        ((squares(model, one) + squares(model, two)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    model.eval()
    expected = sum(float(squares(model, batch).detach()) for batch in steps.held_back) / 2
    assert found == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- search


def parabola(best, tried):
    """A probe of ten steps whose loss is least at a rate."""

    class Parabola(Probe):
        def __call__(self, rate):
            tried.append(rate)
            if rate > 100 * best:
                raise Diverged("a probe")
            return math.log2(rate / best) ** 2

    return Parabola(nn.Identity(), [[]] * 10, [None], squares, lambda rate: torch.optim.SGD([torch.zeros(1)], rate))


@given(st.floats(-5.4, 5.4))
def test_the_choice_is_the_rung_next_to_the_best_within_the_steps_announced(distance):
    best, tried = 1e-3 * 2.0**distance, []
    choice = Search([Rule(0.5e-3, "a rule"), Rule(2.0, "another")], parabola(best, tried), 1000).choose()
    assert choice.bracketed
    assert choice.rate == pytest.approx(best, rel=0.05)  # a parabola's least, to two digits
    assert choice.steps == 10 * len(tried) <= 10 * MOST_RATES
    assert [rate for rate, _ in choice.tried] == sorted(tried)


def test_a_best_rate_at_the_edge_is_said():
    choice = Search([Rule(1e-3, "a rule")], parabola(1.0, []), 1000).choose()
    assert not choice.bracketed
    assert "at the edge" in str(choice) and choice.rate == max(rate for rate, _ in choice.tried)


def test_no_rate_that_trains_is_an_error():
    with pytest.raises(Diverged, match=r"none from 1\.5625e-05 to 0\.002"):
        Search([Rule(1e-3, "a rule")], parabola(1e-9, []), 1000).choose()


@given(st.integers(1, 10**6))
def test_what_probes_take_is_bounded(steps):
    total = MOST_RATES * probe_length(steps)
    assert (
        MOST_RATES * LEAST_STEPS <= total <= min(max(SHARE * steps, MOST_RATES * LEAST_STEPS), MOST_RATES * MOST_STEPS)
    )


@given(st.integers(2, 40), st.integers(1, 12), st.integers(1, 3))
def test_what_is_held_back_is_not_trained_on(count, steps, accumulated):
    trained, held_back = _parts(list(range(count)), steps, accumulated)
    assert [len(batches) for batches in trained] == [accumulated] * steps
    assert held_back and not {batch for batches in trained for batch in batches} & set(held_back)


def test_one_batch_is_too_little():
    with pytest.raises(RecipeError, match="expected two batches at least, found 1"):
        _parts([{}], 10, 1)
