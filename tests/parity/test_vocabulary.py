"""Vocabularies that are tied, trained whole, or resized: what is saved is what the model uses, and comes back."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_written import IDS, SAID, llama, outputs, perturb_peft, written
from safetensors.torch import load_file
from torch import nn
from zoo import left_as_it_was, perturb

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import AttachError, BaseMismatch, ShapeMismatch, UnexpectedTensor, UnsupportedAdapter
from rankwise.inspection.inspection import inspect

pytestmark = [pytest.mark.filterwarnings(said) for said in SAID]

BOTH = ["embed_tokens", "lm_head"]
SPEC = rw.LoRA(rank=2, target_modules=["q_proj"])


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


@pytest.mark.parametrize("whole", [BOTH, ["lm_head"], ["embed_tokens"]], ids="+".join)
@pytest.mark.parametrize("build", [tied, llama], ids=["tied", "untied"])
def test_a_vocabulary_that_peft_trained_whole(build: Callable[[], nn.Module], whole: list[str], tmp_path: Path):
    """PEFT trains a copy for each module, though the base ties them."""
    base = build()
    expected = outputs(written(base, tmp_path / "a", r=2, target_modules=["q_proj"], modules_to_save=whole))
    ours = rw.load(copy.deepcopy(base), tmp_path / "a")
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    rw.load(ours, tmp_path / "a", name="second")  # while the first one's copies are in place
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    rw.detach(ours, "second")
    rw.activate(ours, "default")
    with rw.disabled(ours):
        assert torch.equal(outputs(ours), outputs(base))
    rw.save(ours, tmp_path / "b")
    assert (outputs(rw.load(copy.deepcopy(base), tmp_path / "b")) - expected).abs().max() <= 1e-5
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "b"))
    assert (outputs(again) - expected).abs().max() <= 1e-5
    assert torch.equal(outputs(rw.detach(ours)), outputs(base))


@pytest.mark.parametrize("whole", [BOTH, ["lm_head"], ["embed_tokens"]], ids="+".join)
def test_a_vocabulary_that_peft_trained_as_one(whole: list[str], tmp_path: Path):
    """With ensure_weight_tying the file has both tensors, though modules_to_save names one."""
    fields = {"target_modules": ["q_proj"], "modules_to_save": whole, "ensure_weight_tying": True}
    expected = outputs(written(tied(), tmp_path / "a", r=2, **fields))
    ours = rw.load(tied(), tmp_path / "a")
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    rw.save(ours, tmp_path / "b")
    assert (outputs(PeftModel.from_pretrained(tied(), str(tmp_path / "b"))) - expected).abs().max() <= 1e-5


def test_copies_that_are_alike_stay_tied(tmp_path: Path):
    spec = rw.LoRA(rank=2, target_modules=["q_proj"], modules_to_save=BOTH)
    model = rw.attach(tied(), spec)
    perturb(model, 0.1)
    rw.save(model, tmp_path)
    again = rw.load(tied(), tmp_path, trainable=True)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert len(rw.trainable_parameters(again)) == 2 * 2 + 1
    assert torch.equal(outputs(again), outputs(model))


# ------------------------------------------------------------------------- a model that is changed under its adapter


@pytest.mark.parametrize("build", [tied, llama], ids=["tied", "untied"])
def test_a_vocabulary_resized_under_the_adapter_is_saved_with_it(build: Callable[[], nn.Module], tmp_path: Path):
    """Its new rows are in no other file."""
    model = rw.attach(build(), SPEC)
    perturb(model, 0.1)
    torch.manual_seed(7)
    model.resize_token_embeddings(70, mean_resizing=False)
    expected = outputs(model)
    rw.save(model, tmp_path)
    names = [name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")]
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(names)
    assert not inspect(tmp_path).problems
    base = build()
    with left_as_it_was(base), pytest.raises(ShapeMismatch, match=r"\(70, 32\).*expected \(64, 32\).*resize_token_emb"):
        rw.load(base, tmp_path)
    torch.manual_seed(8)  # other new rows
    base.resize_token_embeddings(70, mean_resizing=False)
    assert (outputs(base)[..., 64:] - expected[..., 64:]).abs().max() > 1e-3
    assert (outputs(rw.load(copy.deepcopy(base), tmp_path)) - expected).abs().max() <= 1e-5
    assert (outputs(PeftModel.from_pretrained(base, str(tmp_path))) - expected).abs().max() <= 1e-5


def _resize(model: nn.Module) -> None:
    model.resize_token_embeddings(70)


def _tie(model: nn.Module) -> None:
    model.tie_weights()


def _replace(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32, bias=False)


def _drop(model: nn.Module) -> None:
    del model.model.layers[1]


CHANGES: dict[str, tuple[Callable[[], nn.Module], rw.LoRA, Callable[[nn.Module], None], str]] = {
    "an adapted embedding resized": (
        llama, rw.LoRA(rank=2, target_modules=BOTH), _resize,
        r"(embed_tokens: the layer was resized|lm_head: the layer was replaced)",
    ),
    "a trained head replaced": (
        llama, rw.LoRA(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), _resize,
        r"lm_head: the module was replaced",
    ),
    "a trained head tied again": (
        tied, rw.LoRA(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), _tie,
        r"lm_head: its weight is no longer the trained copy.*rankwise.activate\(model, 'default'\)",
    ),
    "a layer replaced": (llama, SPEC, _replace, r"layers.0.self_attn.q_proj: the layer was replaced"),
    "a layer dropped": (llama, SPEC, _drop, r"layers.1.self_attn.q_proj: the layer was replaced"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_model_does_not_use_is_not_saved(name: str, tmp_path: Path):
    build, spec, change, message = CHANGES[name]
    model = rw.attach(build(), spec)
    perturb(model, 0.1)
    rw.save(model, tmp_path / "before")
    change(model)
    with pytest.raises(AttachError, match=message):
        rw.save(model, tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_a_copy_that_was_tied_away_can_be_put_back(tmp_path: Path):
    model = rw.attach(tied(), rw.LoRA(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    perturb(model, 0.1)
    expected = outputs(model)
    model.tie_weights()
    assert not torch.equal(outputs(model), expected)
    rw.activate(model, "default")
    assert torch.equal(outputs(model), expected)
    rw.save(model, tmp_path)
    assert (outputs(rw.load(tied(), tmp_path)) - expected).abs().max() <= 1e-5


def test_a_head_that_was_tied_to_a_trained_copy_is_saved_with_it(tmp_path: Path):
    """As ``tie_weights`` does, which much calls: the model then uses the copy in both places."""
    model = rw.attach(tied(), rw.LoRA(rank=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    perturb(model, 0.1)
    model.tie_weights()
    expected = outputs(model)
    rw.save(model, tmp_path)
    assert not inspect(tmp_path).problems
    assert (outputs(rw.load(tied(), tmp_path)) - expected).abs().max() <= 1e-5
    assert (outputs(PeftModel.from_pretrained(tied(), str(tmp_path))) - expected).abs().max() <= 1e-5


def test_trained_copies_follow_a_resized_vocabulary(tmp_path: Path):
    """transformers resizes an embedding in place; the copy is what is there."""
    model = rw.attach(tied(), rw.LoRA(rank=2, target_modules=["q_proj"], modules_to_save=BOTH))
    perturb(model, 0.1)
    model.resize_token_embeddings(70)
    assert outputs(model).shape == (*IDS.shape, 70)
    try:
        rw.save(model, tmp_path)
    except AttachError as error:
        assert "lm_head" in str(error)
        return
    other = tied()
    other.resize_token_embeddings(70)
    assert (outputs(rw.load(other, tmp_path)) - outputs(model)).abs().max() <= 1e-5


# --------------------------------------------------------------------------------- whole embeddings that a file brings


def _grown(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The base with six tokens more, whose rows depend on the seed."""
    model = build()
    torch.manual_seed(seed)
    model.resize_token_embeddings(70, mean_resizing=False)
    return model


EMBEDDINGS: dict[str, list[str]] = {
    "beside": ["q_proj"],
    "adapted": ["q_proj", "embed_tokens"],
    "both adapted": ["q_proj", "embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("build", [tied, llama], ids=["tied", "untied"])
def test_embeddings_that_peft_saves_of_a_resized_vocabulary(build: Callable[[], nn.Module], name: str, tmp_path: Path):
    peft = get_peft_model(_grown(build, 7), LoraConfig(r=2, target_modules=EMBEDDINGS[name]))
    perturb_peft(peft)
    peft.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    base = _grown(build, 8)
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")))
    assert (outputs(base)[..., 64:] - expected[..., 64:]).abs().max() > 1e-3
    ours = rw.load(copy.deepcopy(base), tmp_path / "a")
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    assert not inspect(tmp_path / "a").problems
    rw.save(ours, tmp_path / "b")
    for again in (
        rw.load(copy.deepcopy(base), tmp_path / "b"),
        PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "b")),
    ):
        assert (outputs(again) - expected).abs().max() <= 1e-5
    assert torch.equal(outputs(rw.detach(ours)), outputs(base))
    small = build()
    with left_as_it_was(small), pytest.raises(ShapeMismatch, match=r"resize_token_embeddings\(70\)"):
        rw.load(small, tmp_path / "a")
    with left_as_it_was(base), pytest.raises(UnexpectedTensor, match="would replace a whole tensor"):
        rw.load(base, tmp_path / "a", modules_to_save=())


def test_embeddings_that_are_the_bases_own_are_not_replaced(tmp_path: Path):
    peft = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    perturb_peft(peft)
    peft.save_pretrained(str(tmp_path), save_embedding_layers=True)
    ours = rw.load(llama(), tmp_path)
    assert (outputs(ours) - outputs(peft)).abs().max() <= 1e-5
    assert not Adapted.of(ours).whole_modules


def test_embeddings_of_another_base_are_refused(tmp_path: Path):
    peft = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    peft.save_pretrained(str(tmp_path), save_embedding_layers=True)
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    with left_as_it_was(other), pytest.raises(BaseMismatch, match=r"embed_tokens.weight whole, and \d+% of its rows"):
        rw.load(other, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_relative_pair_on_a_tied_head(start: str, tmp_path: Path):
    """PEFT's start would change the embedding with it."""
    peft = get_peft_model(tied(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=start))
    peft.save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(UnsupportedAdapter, match="lm_head: its weight is shared by"):
        rw.load(tied(), tmp_path)


class BiasedHead(nn.Module):
    """A head with a bias, as Phi's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed_tokens, self.lm_head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed_tokens(ids))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_an_adapted_head_with_a_bias(tmp_path: Path):
    peft = get_peft_model(BiasedHead(), LoraConfig(r=2, target_modules=BOTH))
    perturb_peft(peft)
    peft.save_pretrained(str(tmp_path))
    assert "base_model.model.lm_head.base_layer.bias" in load_file(tmp_path / "adapter_model.safetensors")
    assert not inspect(tmp_path).problems and not inspect(tmp_path).replaced
    assert (outputs(rw.load(BiasedHead(), tmp_path)) - outputs(peft)).abs().max() <= 1e-5


def test_whole_embeddings_stay_with_an_adapter_as_a_value(tmp_path: Path):
    """Read, combined, squeezed and written again without a model."""
    peft = get_peft_model(_grown(llama, 7), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    perturb_peft(peft)
    peft.save_pretrained(str(tmp_path / "a"))
    base = _grown(llama, 8)
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a")))
    adapter = rw.read(tmp_path / "a")
    combined = rw.algebra.combine([(adapter, 0.5), (adapter, 0.5)], method="exact").adapter
    for number, value in enumerate((adapter, combined, rw.algebra.squeeze(adapter, rank=2).adapter)):
        rw.write(value, tmp_path / str(number))
        assert (outputs(rw.load(copy.deepcopy(base), tmp_path / str(number))) - expected).abs().max() <= 1e-5
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / str(number)))
        assert (outputs(theirs) - expected).abs().max() <= 1e-5
