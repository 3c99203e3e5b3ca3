"""What is exported for mlx-lm, read by mlx-lm: its outputs are ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_readers import mlx_logits
from tiny_models import FAMILIES, adapted, patterns, tiny_model
from zoo import relative

import rankwise as rw
from rankwise.errors import UnsupportedAdapter

pytest.importorskip("mlx_lm")
IDS = [3, 17, 5, 40, 2, 9, 33]
# fp32 on both sides, but mlx's exp, erf and tanh are approximations: the base alone differs by as much.
TOLERANCE = 2e-4


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0]


def check(model: Any, tmp_path: Path, **fields: Any) -> None:
    """Save, export, and compare what mlx-lm reads; the base alone must be something else."""
    model.save_pretrained(tmp_path / "base")
    base = logits(model)
    rw.save(adapted(model, **fields), tmp_path / "adapter")
    expected = logits(model)
    rw.detach(model)
    exported = rw.export(tmp_path / "adapter", "mlx", tmp_path / "out", base=model)
    assert exported.form == "adapter"
    assert relative(mlx_logits(tmp_path / "base", None, IDS), base) < TOLERANCE
    assert relative(mlx_logits(tmp_path / "base", tmp_path / "out", IDS), expected) < TOLERANCE
    assert relative(base, expected) > 0.05


# mlx-lm's GPT-2 wants n_ctx in the configuration, which transformers 5 no longer writes.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "GPT2"])
def test_every_architecture(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    check(model, tmp_path, **patterns(model))


def test_anchored_starts_and_dora(tmp_path: Path) -> None:
    check(tiny_model("Llama"), tmp_path / "pissa", init="pissa")
    check(tiny_model("Llama"), tmp_path / "dora", variant="dora", rank_pattern={"q_proj": 2})


def test_embeddings_and_heads(tmp_path: Path) -> None:
    check(tiny_model("Llama"), tmp_path, target_modules=["embed_tokens", "lm_head", "q_proj"])


def test_a_tied_embedding_is_merged_or_refused(tmp_path: Path) -> None:
    """There the pair would change the head as well, and so would a merged weight."""
    model = tiny_model("Llama", tie_word_embeddings=True)
    rw.save(adapted(model, target_modules=["embed_tokens"]), tmp_path / "adapter")
    rw.detach(model)
    with pytest.raises(rw.errors.MergeError, match=r"embed_tokens: its weight is shared"):
        rw.export(tmp_path / "adapter", "mlx", tmp_path / "out", base=model)
    assert not (tmp_path / "out").exists()


def test_whole_modules_are_merged(tmp_path: Path) -> None:
    """In a checkpoint that names rope_theta, which mlx-lm's llama reads, and transformers 5 does not write."""
    model = tiny_model("Llama", rope_parameters={"rope_theta": 1234.0, "rope_type": "default"})
    base = logits(model)
    rw.save(adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path / "adapter")
    expected = logits(model)
    rw.detach(model)
    with pytest.raises(UnsupportedAdapter, match=r"refuses modules_to_save \(lm_head\)"):
        rw.export(tmp_path / "adapter", "mlx", tmp_path / "out")
    exported = rw.export(tmp_path / "adapter", "mlx", tmp_path / "out", base=model)
    assert exported.form == "merged checkpoint"
    assert torch.equal(logits(model), base)  # which stays as it was
    from mlx_lm.utils import load_config

    assert load_config(tmp_path / "out")["rope_theta"] == 1234.0
    assert relative(mlx_logits(tmp_path / "out", None, IDS), expected) < TOLERANCE
    assert relative(base, expected) > 0.05
