"""How tokens are chosen, beside transformers' own; and how they become text piece by piece."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import tiny_tokenizer
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rankwise.serve.sampling import Sampling, draw, probabilities, token_logprobs
from rankwise.serve.text import TextStream

TOKENIZER = tiny_tokenizer()


@given(
    seed=st.integers(0, 999),
    temperature=st.floats(0.05, 3),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.01, 1),
)
def test_the_chances_are_those_of_transformers(seed, temperature, top_k, top_p):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = TemperatureLogitsWarper(temperature)(None, logits[None].clone())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    sampling = Sampling(1, temperature=temperature, top_p=top_p, top_k=top_k)
    torch.testing.assert_close(probabilities(logits, sampling), expected.softmax(-1)[0])


def test_draws_have_these_chances():
    logits = torch.tensor([1.0, 0.0, -torch.inf, 2.0])
    sampling = Sampling(1, temperature=1.0, seed=3)
    generator = sampling.generator()
    counts = torch.bincount(torch.tensor([draw(logits, sampling, generator) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, logits.softmax(0), atol=0.03, rtol=0)
    assert counts[2] == 0


def test_the_smallest_temperature_is_the_likeliest_token():
    logits = torch.tensor([3.0e4, -3.0e4, 2.9e4])
    assert probabilities(logits, Sampling(1, temperature=1e-30)).tolist() == [1, 0, 0]


def test_a_seed_repeats_its_draws_and_none_does_not():
    logits = torch.zeros(10**6)

    def draws(seed):
        sampling = Sampling(1, temperature=1.0, seed=seed)
        generator = sampling.generator()
        return [draw(logits, sampling, generator) for _ in range(3)]

    assert draws(5) == draws(5) != draws(6)
    assert draws(None) != draws(None)


def test_logprobs_are_those_of_the_softmax():
    logits = torch.tensor([0.5, 2.0, -1.0])
    reported = token_logprobs(logits, 2, 2)
    expected = logits.log_softmax(0)
    assert reported.logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in reported.top] == [1, 0]
    assert [value for _, value in reported.top] == pytest.approx([float(expected[1]), float(expected[0])])


def pieces(text: str, stop=(), tokenizer=TOKENIZER) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    given_out = []
    for token in tokenizer(text)["input_ids"]:
        given_out.append(stream.push(token))
        if stream.stopped:
            break
    return [*given_out, stream.finish()], stream.stopped


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ufffd<"), max_size=12))
def test_the_pieces_are_the_text(text):
    """A byte is a token here, so that every character but ASCII's comes in parts."""
    given_out, _ = pieces(text)
    assert "".join(given_out) == text
    assert not any("\ufffd" in piece for piece in given_out)


@given(st.text(alphabet="abc", max_size=12), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_ends_the_answer_before_it(text, stop):
    given_out, stopped = pieces(text, stop)
    # As soon as one is complete; of several that are complete then, the one that begins first.
    ends = [
        min(text.find(one) for one in stop if one in text[:length])
        for length in range(len(text) + 1)
        if any(one in text[:length] for one in stop)
    ]
    assert stopped == bool(ends)
    assert "".join(given_out) == (text[: ends[0]] if ends else text)


def test_an_answer_that_ends_inside_a_character_says_so():
    stream = TextStream(TOKENIZER)
    first, _ = TOKENIZER("é")["input_ids"]
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"


def test_what_is_settled_does_not_wait_for_the_end():
    given_out, _ = pieces("one two", ["STOP"])
    assert given_out[:7] == list("one two")
