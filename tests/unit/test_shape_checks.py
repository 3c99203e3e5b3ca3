"""The shape annotations of the core are live under pytest, and are plain types without jaxtyping."""

import subprocess
import sys

import pytest
import torch

from rankwise.algebra.low_rank import LowRank, difference
from rankwise.layers.low_rank_product import add_low_rank


def test_a_wrong_shape_raises():
    with pytest.raises(TypeError, match="LowRank"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))  # the ranks differ
    with pytest.raises(TypeError, match="difference"):
        difference(torch.zeros(3, 2), torch.zeros(2, 4), torch.zeros(5, 2), torch.zeros(2, 4), 1.0)
    with pytest.raises(TypeError, match="add_low_rank"):
        add_low_rank(torch.zeros(6, 3), torch.zeros(6, 4), torch.zeros(2, 4), torch.zeros(5, 2), 1.0)
    with pytest.raises(TypeError, match="add_low_rank"):
        add_low_rank(torch.zeros(6, 3), torch.zeros(7, 4), torch.zeros(2, 4), torch.zeros(3, 2), 1.0)


def test_a_wrong_type_raises():
    with pytest.raises(TypeError, match="LowRank"):
        LowRank(torch.zeros(3, 2, dtype=torch.long), torch.zeros(2, 4))
    with pytest.raises(TypeError, match="scale"):
        add_low_rank(torch.zeros(6, 3), torch.zeros(6, 4), torch.zeros(2, 4), torch.zeros(3, 2), "1")


def test_right_shapes_pass():
    assert LowRank(torch.zeros(3, 2), torch.zeros(2, 4)).shape == (3, 4)


def test_the_core_runs_without_jaxtyping():
    code = (
        "import sys; sys.modules['jaxtyping'] = None; import torch, rankwise as rw;"
        "m = rw.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), rw.LoRA(rank=2, init='pissa'));"
        "m(torch.randn(2, 4)).sum().backward()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
