"""What is exact on SmolLM2-135M, and how nearly: starts, base weights, bf16 error, closed forms, PEFT files, merging.

python benchmarks/exactness.py
"""

import hashlib
import tempfile
from typing import Any

import torch
from common import MODEL, batches, machine, write
from peft import LoraConfig, PeftModel, get_peft_model

import rankwise as rw
from rankwise.algebra.low_rank import LowRank, difference
from rankwise.inits import INITS
from rankwise.sites import Site
from rankwise.train.model.pretrained import load_pretrained

SKIPPED = {"loftq": "corrects a quantised base, so its start differs from that base on purpose"}


def fresh() -> Any:
    return load_pretrained(MODEL)[0].eval()


def fingerprint(model: Any) -> str:
    """SHA-256 over the base weights, adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".rankwise." not in name:
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def relative_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of a logit over the largest logit: rounding is relative to what is rounded."""
    return gap(a, b) / float(b.abs().max())


def train(model: Any, data: list[dict[str, torch.Tensor]], rate: float = 1e-4) -> None:
    optimizer = torch.optim.AdamW(rw.trainable_parameters(model), lr=rate)
    model.train()
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def starts(data: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Every initialisation: logits after attach, disabled and detached; the base's hash all along; merge; PEFT."""
    result: dict[str, Any] = {}
    model = fresh()
    reference, before = logits(model, data[0]), fingerprint(model)
    for init in INITS:
        if init in SKIPPED:
            result[init] = SKIPPED[init]
            continue
        rw.attach(model, rw.LoRA(init=init, scaling="rslora"), batches=data)
        row: dict[str, Any] = {"logit gap after attach": gap(logits(model, data[0]), reference)}
        train(model, data[:2])
        trained = logits(model, data[0])
        with rw.disabled(model):
            row["logit gap disabled, after training"] = gap(logits(model, data[0]), reference)
        with tempfile.TemporaryDirectory() as directory:
            rw.save(model, directory)
            theirs = PeftModel.from_pretrained(fresh(), directory)
            row["relative logit gap to PEFT reading our file"] = relative_gap(logits(theirs, data[0]), trained)
        hashes = [fingerprint(model)]
        report = rw.merge(model)
        row["relative logit gap merged"] = relative_gap(logits(model, data[0]), trained)
        row["worst share of a site's change lost by merging"] = report.sites[report.worst].lost
        rw.detach(model)
        hashes.append(fingerprint(model))
        row["base bit-identical after training, and after merge + detach"] = [h == before for h in hashes]
        row["training moved the logits by"] = gap(trained, reference)
        result[init] = row
        print(init, row, flush=True)
    return result


def merged_in_bf16(data: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    model = fresh().to(torch.bfloat16)
    rw.attach(model, rw.LoRA(), batches=data)
    train(model, data[:2])
    adapted = logits(model, data[0]).float()
    losses = sorted(site.lost for site in rw.merge(model, most_lost=1.0).sites.values())
    return {
        "share of the change lost, median site": losses[len(losses) // 2],
        "worst site": losses[-1],
        "relative logit gap merged": relative_gap(logits(model, data[0]).float(), adapted),
    }


def from_peft(batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative logit gap of ours reading what PEFT wrote."""
    configs = {
        "lora": {},
        "rslora, patterns": {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"layers.3.mlp.up_proj": 5},
        },
        "embedding too": {"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
    }
    result = {}
    for name, options in configs.items():
        options = {"target_modules": "all-linear", **options}
        theirs = get_peft_model(fresh(), LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, **options))
        with (
            torch.no_grad()
        ):  # of a size that training reaches; PEFT's random pairs leave a model that amplifies rounding
            for name_of_tensor, tensor in theirs.named_parameters():
                if "lora_B" in name_of_tensor or "lora_embedding_B" in name_of_tensor:
                    tensor.mul_(0.05)
        with tempfile.TemporaryDirectory() as directory:
            theirs.save_pretrained(directory)
            result[name] = relative_gap(logits(rw.load(fresh(), directory), batch), logits(theirs, batch))
    return result


def difference_form(deltas: tuple[float, ...] = (1e-4, 1e-3)) -> dict[str, Any]:
    """Relative error of ΔW·x in bf16 against fp64, for a 1024² matrix at rank 8, |δ| an entry.

    Ours: the adapter's output, computed in bf16. PEFT's: the change that its stored tensors stand for, base folded and
    rounded to bf16, evaluated in fp64, so this is what its storage alone has lost.
    """
    torch.manual_seed(0)
    size, site = 1024, Site("site", "linear", (1024, 1024), 8, 16 / 8**0.5)
    weight = torch.randn(size, size) / size**0.5
    weight = weight.bfloat16().float()
    x = torch.randn(512, size).bfloat16()
    gradient = rw.evidence.ExactGradient(torch.randn(size, 64) @ torch.randn(64, size))
    result: dict[str, Any] = {}
    for name in ("kaiming", "gaussian", "init-b", "pissa", "olora", "lora-ga"):
        start = INITS[name].cls()(weight, site, gradient, torch.Generator().manual_seed(0))
        for size_of_delta in deltas:
            A, B = (size_of_delta * torch.randn_like(half) for half in (start.A, start.B))
            exact = difference(B.double(), A.double(), start.B.double(), start.A.double(), site.scale)
            wanted = exact.apply(x.double())
            ours = difference(B, A, start.B, start.A, site.scale)
            mine = LowRank(ours.B.bfloat16(), ours.A.bfloat16(), site.scale).apply(x).double()
            folded = (weight - LowRank(start.B, start.A, site.scale).dense()).bfloat16().double()
            peft = folded + LowRank((start.B + B).double(), (start.A + A).double(), site.scale).dense()
            theirs = x.double() @ (peft - weight.double()).T
            result.setdefault(name, {})[f"|δ| = {size_of_delta:g}"] = {
                "rankwise": float((mine - wanted).norm() / wanted.norm()),
                "peft": float((theirs - wanted).norm() / wanted.norm()),
            }
    return result


def closed_form(data: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """LoRA-GA against the exact SVD on every layer of the model, r = 8."""
    model = fresh()
    gradients = rw.gradients(model, data)
    scaled = {k: rw.evidence.ExactGradient(v.matrix * 1e3) for k, v in gradients.items()}
    capture, change, step = [], [], []
    for evidence, starts_of in ((gradients, capture), (scaled, change)):
        rw.attach(model, rw.LoRA(init=rw.inits.LoraGA(scale="gd")), evidence=evidence)
        starts_of.extend((p.name, p.A.clone(), p.B.clone(), p.scale) for p in rw.pairs(model))
        rw.detach(model)
    worst_capture = worst_step = worst_scaling = 0.0
    for (name, A, B, s), (_, A2, B2, _) in zip(capture, change, strict=True):
        G = gradients[name].matrix
        moved = s * s * (B @ (B.T @ G) + (G @ A.T) @ A)
        u, singular, v = torch.linalg.svd(G.double(), full_matrices=False)
        best = ((u[:, :16] * singular[:16]) @ v[:16]).float()
        energy = singular.square()
        captured = 1 - float((moved - G).double().square().sum() / energy.sum())
        optimum = float(energy[:16].sum() / energy.sum())
        worst_capture = max(worst_capture, abs(captured / optimum - 1))
        step.append(float((moved - best).norm() / best.norm()))
        worst_scaling = max(worst_scaling, float((A - A2).norm() / A.norm()), float((B - B2).norm() / B.norm()))
    worst_step = max(step)
    return {
        "layers": len(capture),
        "largest |captured energy / best rank-16 energy − 1|": worst_capture,
        "largest relative gap of one SGD step (scale gd) to the projected full step": worst_step,
        "mean of that gap": sum(step) / len(step),
        "largest relative change of A₀ or B₀ when the loss is multiplied by 1000": worst_scaling,
    }


def main() -> None:
    data = batches(2)
    result = {
        "what": __doc__,
        "machine": machine(),
        "difference form": difference_form(),
        "starts": starts(data),
        "reading PEFT's files, relative logit gap": from_peft(data[0]),
        "LoRA-GA against closed form": closed_form(data),
        "merging in bf16": merged_in_bf16(data),
    }
    write("exactness", result)


if __name__ == "__main__":
    main()
