"""Prefix tuning from PEFT on a model that carries our adapters: the base is untouched, so the two combine."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model

import rankwise as rw

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import prefix_tuning_with_lora as example

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def make() -> tuple[Any, dict[str, torch.Tensor]]:
    tokens = torch.randint(64, (4, 12))
    return example.tiny_llama(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def combined(model: Any, init: str) -> Any:
    rw.attach(model, rw.LoRA(rank=4, init=init))
    both = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    rw.activate(both, "default")
    return both


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_both_are_trained_and_the_base_is_not(init: str) -> None:
    model, batch = make()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    pretrained = model(**batch).logits.detach()
    both = combined(model, init)
    trained = {name for name, p in both.named_parameters() if p.requires_grad}
    assert any("rankwise" in name for name in trained) and any("prompt_encoder" in name for name in trained)
    assert all("rankwise" in name or "prompt_encoder" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = both(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in both.parameters() if p.requires_grad)
        optimizer.step()
    assert losses[-1] < losses[0]
    rw.detach(both)
    assert torch.equal(both.get_base_model()(**batch).logits, pretrained)
    torch.testing.assert_close(dict(both.get_base_model().state_dict()), base, rtol=0, atol=0)


def test_each_is_saved_and_read_by_its_own_library(tmp_path: Path) -> None:
    model, batch = make()
    both = combined(model, "pissa")
    with torch.no_grad():
        for parameter in both.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    both.save_pretrained(tmp_path / "prefix")
    rw.save(both, tmp_path / "lora")
    again = rw.load(example.tiny_llama(), tmp_path / "lora")
    again = PeftModel.from_pretrained(again, str(tmp_path / "prefix"))
    torch.testing.assert_close(again.eval()(**batch).logits, both.eval()(**batch).logits, atol=1e-5, rtol=1e-4)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    first, last, again = (float(word) for word in capsys.readouterr().out.split() if word[0].isdigit())
    assert last < first and again < first
