"""LoRA(...): validated when it is made, plain data both ways, hashable, picklable."""

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankwise as rw
from rankwise.errors import SpecError
from rankwise.inits import INITS
from rankwise.scaling import SCALINGS, LoraScaling, RsloraScaling
from rankwise.variants import VARIANTS
from rankwise.variants.lora import FoldedLora

EXAMPLES = [
    rw.LoRA(),
    rw.LoRA(rank=4, alpha=7.5, target_modules=["q_proj", "v_proj"], exclude_modules=("lm_head",), seed=3),
    rw.LoRA(target_modules=r".*\.(up|down)", init=rw.inits.LoraGA(directions="random", scale="gd", gamma=4.0)),
    rw.LoRA(rank_pattern={"q": 2, r"layers\.0\..*": 4}, alpha_pattern={"q": 1.5}, dropout=0.25, scaling="rslora"),
    rw.LoRA(modules_to_save=["classifier"], anchor="fold", init={"name": "pissa", "iterations": 3}),
    *[rw.LoRA(init=name) for name in INITS],
    *[rw.LoRA(variant=name) for name in VARIANTS],
    *[rw.LoRA(scaling=name) for name in SCALINGS],
]


@pytest.mark.parametrize("spec", EXAMPLES, ids=range(len(EXAMPLES)))
def test_plain_data_and_back(spec: rw.LoRA):
    plain = spec.to_dict()
    through_json = json.loads(json.dumps(plain))
    for again in (
        rw.LoRA.from_dict(plain),
        rw.LoRA.from_dict(through_json),
        pickle.loads(pickle.dumps(spec)),
        copy.deepcopy(spec),
    ):
        assert again == spec
        assert hash(again) == hash(spec)
        assert again.to_dict() == plain


def test_all_examples_differ():
    distinct = list(dict.fromkeys(EXAMPLES))
    assert len(distinct) == len(EXAMPLES) - 3  # the defaults come once more for init, variant and scaling
    assert len({hash(spec) for spec in distinct}) == len(distinct)


@given(
    rank=st.integers(1, 512),
    alpha=st.one_of(st.integers(1, 512), st.floats(1e-3, 1e3)),
    dropout=st.floats(0, 0.99),
    scaling=st.sampled_from(list(SCALINGS)),
    init=st.sampled_from(list(INITS)),
    seed=st.integers(0, 2**40),
    names=st.lists(st.sampled_from(["q", "k", "v", "o"]), min_size=1, unique=True),
)
def test_round_trip_of_any_valid_spec(**fields: Any):
    names = fields.pop("names")
    spec = rw.LoRA(**fields, target_modules=names, rank_pattern=dict.fromkeys(names, fields["rank"]))
    assert rw.LoRA.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_names_come_out_as_objects_and_a_spec_cannot_be_changed():
    spec = rw.LoRA(init="lora-ga", target_modules=["q", "v", "q"], rank_pattern={"q": 2})
    assert spec.init == rw.inits.LoraGA()
    assert spec.target_modules == ("q", "v")
    with pytest.raises(AttributeError):
        spec.rank = 3
    with pytest.raises(TypeError):
        spec.rank_pattern["q"] = 3


def test_a_set_of_names_gives_the_same_spec_whatever_its_order():
    from_yaml: Any = {"v", "q", "k"}
    assert rw.LoRA(target_modules=from_yaml) == rw.LoRA(target_modules=["k", "q", "v"])


def test_scales():
    assert LoraScaling()(16, 8) == 2.0
    assert RsloraScaling()(16, 16) == 4.0
    assert rw.LoRA(scaling="rslora").scale(4, 6.0) == 3.0


BAD = [
    ({"rank": 0}, r"rank must be a positive integer, found 0"),
    ({"rank": -3}, r"rank must be a positive integer, found -3"),
    ({"rank": "8"}, r"rank must be a positive integer, found '8'"),
    ({"rank": 8.0}, r"rank must be a positive integer, found 8.0"),
    ({"rank": True}, r"rank must be a positive integer, found True"),
    ({"rank": None}, r"rank must be a positive integer, found None"),
    ({"alpha": float("nan")}, r"alpha must be a positive finite number, found nan"),
    ({"alpha": float("inf")}, r"alpha must be a positive finite number, found inf"),
    ({"alpha": -1}, r"alpha must be a positive finite number, found -1"),
    ({"alpha": 0}, r"alpha must be a positive finite number, found 0"),
    ({"alpha": "16"}, r"alpha must be a positive finite number, found '16'"),
    ({"alpha": 10**400}, r"alpha must be a positive finite number, found 1000"),
    ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, found 1.0"),
    ({"dropout": -0.1}, r"dropout must be at least 0 and below 1, found -0.1"),
    ({"dropout": float("nan")}, r"dropout must be at least 0 and below 1, found nan"),
    ({"scaling": "rslroa"}, r"scaling: expected one of lora, rslora, found 'rslroa'; did you mean 'rslora'\?"),
    ({"scaling": ["lora"]}, r"scaling: expected one of .* found \['lora'\]"),
    ({"anchor": "frozne"}, r"anchor must be one of frozen, fold, found 'frozne'; did you mean 'frozen'\?"),
    ({"seed": 1.5}, r"seed must be an integer, found 1.5"),
    ({"target_modules": []}, r"target_modules is an empty list.*'all-linear'"),
    ({"target_modules": ""}, r"target_modules is an empty string"),
    ({"target_modules": ["q", 3]}, r"target_modules must be a string or a list of non-empty strings, found \['q', 3\]"),
    ({"target_modules": ["q", ""]}, r"target_modules must be a string or a list of non-empty strings"),
    ({"exclude_modules": 7}, r"exclude_modules must be a string or a list of non-empty strings, found 7"),
    ({"modules_to_save": None}, r"modules_to_save must be a string or a list of non-empty strings, found None"),
    ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a positive integer, found 0"),
    ({"rank_pattern": {"(": 2}}, r"rank_pattern key '\(' is not a regular expression"),
    ({"alpha_pattern": {3: 2}}, r"alpha_pattern key 3 is not a regular expression"),
    ({"rank_pattern": ["q"]}, r"rank_pattern must map a module pattern to a number, found \['q'\]"),
    ({"alpha_pattern": {"q": float("nan")}}, r"alpha_pattern\['q'\] must be a positive finite number, found nan"),
    ({"init": "piss"}, r"init: expected one of .*found 'piss'; did you mean 'pissa'\?"),
    ({"init": 3}, r"init: expected one of .*found 3"),
    ({"init": {"iterations": 3}}, r"init: expected one of .*found None"),
    ({"init": {"name": "pissa", "iteration": 3}}, r"'pissa': unknown option 'iteration'.*did you mean 'iterations'\?"),
    ({"init": {"name": ["pissa"]}}, r"init: expected one of .*found \['pissa'\]"),
    ({"init": {"name": "lora-ga", "directions": "ArBr2"}}, r"'lora-ga': directions must be one of .*found 'ArBr2'"),
    ({"init": {"name": "lora-ga", "scale": "stabel"}}, r"'lora-ga': scale must be one of .*found 'stabel'"),
    ({"init": {"name": "lora-ga", "align": "momentum"}}, r"'lora-ga': align must be one of .*found 'momentum'"),
    ({"init": {"name": "lora-ga", "gamma": 0.0}}, r"'lora-ga': gamma must be a positive number, found 0.0"),
    ({"init": {"name": "lora-ga", "gamma": float("nan")}}, r"'lora-ga': gamma must be a positive number, found nan"),
    ({"init": {"name": "lora-ga", "gamma": "16"}}, r"'lora-ga'.*gamma.*found '16'"),
    ({"init": {"name": "pissa", "iterations": "8"}}, r"'pissa'.*iterations.*found '8'"),
    ({"variant": "rola"}, r"variant: expected one of .*found 'rola'; did you mean 'lora'\?"),
    ({"variant": FoldedLora()}, r"variant: expected one of .*FoldedLora"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[repr(fields)[:60] for fields, _ in BAD])
def test_bad_fields_are_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        rw.LoRA(**fields)


def test_unknown_keys_are_refused_with_the_nearest_name():
    with pytest.raises(SpecError, match=r"unknown key 'lora_rank', known: rank, alpha.*did you mean"):
        rw.LoRA.from_dict({"lora_rank": 8})
    with pytest.raises(SpecError, match=r"unknown key 'droput'.*; did you mean 'dropout'\?"):
        rw.LoRA.from_dict({"rank": 8, "droput": 0.1})


def test_all_errors_have_one_root_and_a_builtin_kind():
    with pytest.raises(rw.RankwiseError):
        rw.LoRA(rank=0)
    with pytest.raises(ValueError):
        rw.LoRA(rank=0)


def test_fold_goes_with_plain_lora_only():
    for variant in VARIANTS:
        if variant != "lora":
            with pytest.raises(SpecError, match=r"anchor='fold' goes with variant='lora' only"):
                rw.LoRA(anchor="fold", variant=variant)
