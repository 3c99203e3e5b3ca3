"""An adapter on SmolLM2 that is exported and read by llama.cpp itself, where it was built (`make engines`)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_readers import LLAMA_CPP, SERVER, WITHOUT_SERVER, llama_server
from tiny_models import adapted

import rankwise as rw
from rankwise.train.model.pretrained import load_pretrained, locate

pytestmark = [pytest.mark.end_to_end, pytest.mark.skipif(not SERVER.is_file(), reason=WITHOUT_SERVER)]
PROMPT = "The capital of France is"


def test_llama_cpp_computes_what_we_do(tmp_path: Path) -> None:
    """Log-probabilities of the next token, from the same weights in fp32, with the adapter and without."""
    model, tokenizer = load_pretrained("smollm2-135m", dtype="float32")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids, vocabulary = inputs["input_ids"][0].tolist(), model.config.vocab_size
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}}
    adapted(model, 0.02, rank=4, alpha=8, init="pissa", scaling="rslora", **patterns)
    rw.save(model.eval(), tmp_path / "adapter")
    with torch.no_grad():
        changed = torch.log_softmax(model(**inputs).logits[0, -1], -1)
        rw.detach(model)
        unchanged = torch.log_softmax(model(**inputs).logits[0, -1], -1)
    rw.export(tmp_path / "adapter", "llama.cpp", tmp_path / "out", base=model)
    converter = [sys.executable, LLAMA_CPP / "convert_hf_to_gguf.py", locate("smollm2-135m"), "--outtype", "f32"]
    subprocess.run([*converter, "--outfile", tmp_path / "base.gguf"], check=True, capture_output=True)
    assert float((changed - unchanged).abs().max()) > 1.0
    for adapter, expected in ((tmp_path / "out" / "adapter.gguf", changed), (None, unchanged)):
        with llama_server(tmp_path / "base.gguf", adapter) as server:
            found = server.log_probabilities(ids, vocabulary)
        assert float((found - expected).abs().max()) < 1e-3
