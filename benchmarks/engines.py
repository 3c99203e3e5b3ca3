"""What other engines compute with exported adapters, beside what rankwise computes: PEFT, mlx-lm, llama.cpp.

    make engines
    python benchmarks/engines.py

Two adapters are trained on SmolLM2-135M, a few steps each at a large rate: an anchored LoRA-GA start with rsLoRA and
patterns of ranks and alphas, and a DoRA. Each is exported for every engine and read by the engine itself; vLLM's and
SGLang's files, whose engines do not run here, are read by PEFT. All is in fp32, llama.cpp's base too, which its own
converter makes of the same weights. Logits are those of every token of a prompt; llama.cpp gives the log-probabilities
of the next token, so these are compared there.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import MODEL, batches, machine, write
from torch import Tensor

import rankwise as rw
from rankwise.cli.values import save_export
from rankwise.train.model.pretrained import load_pretrained, locate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from engine_readers import LLAMA_CPP, SERVER, llama_server, mlx_logits, peft_logits

PROMPT = "In the beginning"
STEPS, GREEDY = 6, 24
ADAPTERS: dict[str, tuple[dict[str, Any], float]] = {
    "LoRA-GA, rsLoRA, patterns": (
        {
            "init": "lora-ga",
            "scaling": "rslora",
            "rank_pattern": {"q_proj": 4, "down_proj": 12},
            "alpha_pattern": {"v_proj": 8},
        },
        3e-4,
    ),
    "DoRA": ({"variant": "dora"}, 2e-3),
}
ENGINES = ("peft", "vllm", "sglang", "llama.cpp", "mlx")


def trained(fields: dict[str, Any], rate: float, folder: Path) -> dict[str, Any]:
    """Save the adapter; what the model computes with it and without."""
    base = locate(MODEL)
    model, tokenizer = load_pretrained(base, dtype="float32")
    steps = batches(STEPS, 2, 64)
    rw.attach(model, rw.LoRA(rank=8, alpha=16, **fields), batches=steps[:2])
    optimizer = torch.optim.AdamW(rw.trainable_parameters(model), lr=rate)
    for batch in steps:
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    rw.save(model, folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        found = {"ids": inputs["input_ids"][0].tolist(), "adapted": model(**inputs).logits[0]}
        said = model.generate(**inputs, max_new_tokens=GREEDY, do_sample=False)[0]
        found["text"] = tokenizer.decode(said[len(found["ids"]) :], skip_special_tokens=True)
        with rw.disabled(model):
            found["base"] = model(**inputs).logits[0]
    return found


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def by_llama_cpp(base: Path, adapter: Path | None, ours: dict[str, Any]) -> tuple[Tensor, str]:
    """Log-probabilities of the next token, and greedy text."""
    with llama_server(base, adapter) as server:
        return server.log_probabilities(ours["ids"], ours["base"].shape[1]), server.greedy(ours["ids"], GREEDY)


def as_gguf(directory: Path, file: Path) -> Path:
    """A transformers directory as llama.cpp's own converter writes it, in fp32."""
    command = [sys.executable, str(LLAMA_CPP / "convert_hf_to_gguf.py"), str(directory), "--outfile", str(file)]
    subprocess.run([*command, "--outtype", "f32"], check=True, capture_output=True)
    return file


def compared(engine: str, out: Path, form: str, ours: dict[str, Any], place: Path, gguf: Path) -> dict[str, Any]:
    """How far the engine is from what we compute, and how far the adapter moves it."""
    base, merged = Path(locate(MODEL)), form == "merged checkpoint"
    if engine == "llama.cpp":
        model = as_gguf(out, place / f"{out.name}.gguf") if merged else gguf
        found, text = by_llama_cpp(model, None if merged else out / "adapter.gguf", ours)
        expected, alone = (torch.log_softmax(ours[which][-1], -1) for which in ("adapted", "base"))
        same_text = {"greedy text the same": text == ours["text"]}
    else:
        read = mlx_logits if engine == "mlx" else peft_logits
        found = read(out, None, ours["ids"]) if merged else read(base, out, ours["ids"])
        expected, alone, same_text = ours["adapted"], ours["base"], {}
    return {"form": form, "gap": gap(found, expected), "moved": gap(alone, expected), **same_text}


def main() -> None:
    if not SERVER.is_file():
        sys.exit(f"expected llama.cpp's server at {SERVER}: run `make engines`")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        gguf = as_gguf(Path(locate(MODEL)), place / "base.gguf")
        for name, (fields, rate) in ADAPTERS.items():
            folder = place / name.split(",")[0]
            ours = trained(fields, rate, folder)
            results[name] = {}
            for engine in ENGINES:
                exported = save_export(folder, engine, MODEL, place / f"{folder.name}-{engine}")
                found = compared(engine, exported.directory, exported.form, ours, place, gguf)
                results[name][engine] = found
                print(name, engine, json.dumps(found), flush=True)
    write("engines", {"prompt": PROMPT, "steps": STEPS, "adapters": results, "machine": machine()})


if __name__ == "__main__":
    main()
