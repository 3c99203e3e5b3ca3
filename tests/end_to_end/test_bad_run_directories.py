"""Run directories with a file of every kind spoilt in every way: named, and the checkpoint before it taken."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from rankwise.errors import CheckpointError
from rankwise.train import recipe as recipes
from rankwise.train.recipe import Recipe
from rankwise.train.run import resume, run
from rankwise.train.trainer.checkpoints import MANIFEST, check_directory, newest_valid

SILENT = Console(quiet=True)
STATE, OPTIMIZER, SCHEDULER, GENERATORS = "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"
RAW = "rankwise_state.safetensors"


@pytest.fixture(scope="module")
def sound(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("run")
    from tiny_llama import write_pairs

    write_pairs(folder / "pairs.jsonl")
    values = {
        "model": str(tiny),
        "data": str(folder / "pairs.jsonl"),
        "rank": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_steps": 1,
        "output_dir": str(folder / "run"),
    }
    run.train(recipes.parse(values), SILENT)
    return folder


@pytest.fixture
def recipe(sound: Path, tiny: Path, tmp_path: Path) -> Recipe:
    """To go on with a copy of that run, whose results are not written yet."""
    shutil.copytree(sound / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    values = {"model": str(tiny), "data": str(sound / "pairs.jsonl"), "rank": 2, "per_device_train_batch_size": 4}
    values |= {"max_steps": 4, "save_steps": 1, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": True}
    return recipes.parse(values)


def forge(checkpoint: Path) -> None:
    """A manifest that says of the files as they are now that they are right."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in checkpoint.iterdir()
        if path.is_file() and path.name != MANIFEST
    }
    write_manifest(checkpoint, {"files": files, "facts": json.loads((checkpoint / MANIFEST).read_text())["facts"]})


def write_manifest(checkpoint: Path, content: dict[str, Any]) -> None:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps(content | {"sha256": digest}))


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


def fields(**values: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values})) and None


def pickled(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def gone(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_metadata(path: Path) -> None:
    save_file(load_file(path), path, {"rankwise_spec": "{"})


def other_tensors(path: Path) -> None:
    save_file({"x": torch.ones(2)}, path, {"rankwise_spec": "{}"})


class Code:
    """What must not be run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


ANY = {
    "gone": gone,
    "a directory": directory,
    "empty": text(""),
    "text": text("no such thing"),
    "an object": text("{}"),
}
TORCH = {"a list": pickled([1]), "a number": pickled(3), "nothing": pickled({}), "code": pickled(Code())}
TORCH |= {"of another kind": pickled({"a": torch.ones(2)}), "cut": lambda path: os.truncate(path, 100)}
CASES: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{f"{name}: {kind}": (name, how) for name in (STATE, OPTIMIZER, GENERATORS, RAW) for kind, how in ANY.items()},
    **{f"{SCHEDULER}: {kind}": (SCHEDULER, how) for kind, how in ANY.items()},
    **{f"{name}: {kind}": (name, how) for name in (OPTIMIZER, GENERATORS) for kind, how in TORCH.items()},
    **{f"{SCHEDULER}: {kind}": (SCHEDULER, TORCH[kind]) for kind in ("a list", "a number", "code", "cut")},
    f"{STATE}: a list": (STATE, text("[]")),
    f"{STATE}: deep": (STATE, text("[" * 100_000)),
    f"{STATE}: step text": (STATE, fields(global_step="4")),
    f"{STATE}: step true": (STATE, fields(global_step=True)),
    f"{STATE}: step negative": (STATE, fields(global_step=-1)),
    f"{STATE}: step of another": (STATE, fields(global_step=2)),
    f"{STATE}: step too large": (STATE, fields(global_step=10**30)),
    f"{STATE}: an unknown key": (STATE, fields(unheard_of=1)),
    f"{STATE}: history a number": (STATE, fields(log_history=3)),
    f"{STATE}: history of numbers": (STATE, fields(log_history=[3])),
    f"{STATE}: steps a list": (STATE, fields(save_steps=[1])),
    f"{STATE}: epochs text": (STATE, fields(num_train_epochs="x")),
}


OF_ANOTHER_STEP = (f"{STATE}: step of another", f"{STATE}: step too large")  # sound ones, under another name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("forged", [False, True], ids=["as it is", "with a manifest that says so"])
def test_a_spoilt_newest_checkpoint_is_passed_over(recipe: Recipe, name: str, forged: bool) -> None:
    file, spoil = CASES[name]
    folder = Path(recipe.output_dir)
    newest = folder / "checkpoint-4"
    spoil(newest / file)
    if forged:
        forge(newest)
    console = Console(width=1000, record=True)
    assert resume.choose(recipe, console) == folder / "checkpoint-3"
    assert f"Passed over a broken checkpoint: {newest}" in console.export_text()
    if not (forged and name in OF_ANOTHER_STEP):
        named = recipe.model_copy(update={"resume_from_checkpoint": str(newest)})
        with pytest.raises(CheckpointError, match=str(newest)):
            resume.choose(named, SILENT)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        (SCHEDULER, pickled({})),
        (OPTIMIZER, pickled({"state": {}, "param_groups": []})),
        (OPTIMIZER, pickled({"state": 3, "param_groups": 4})),
        (GENERATORS, pickled({"python": 1, "numpy": 2, "cpu": 3})),
        (RAW, other_metadata),
        (RAW, other_tensors),
        (STATE, fields(best_model_checkpoint=[])),
    ],
)
def test_what_only_loading_tells_is_named(recipe: Recipe, file: str, spoil: Callable[[Path], None]) -> None:
    newest = Path(recipe.output_dir) / "checkpoint-4"
    shutil.rmtree(newest)
    newest = newest.with_name("checkpoint-3")
    spoil(newest / file)
    forge(newest)
    with pytest.raises(CheckpointError, match=r"checkpoint-3|run: cannot be resumed from"):
        run.train(recipe, SILENT)


ENTRY = {"size": 1, "sha256": "0"}
MANIFESTS: dict[str, Any] = {
    "files a list": {"files": ["optimizer.pt"], "facts": {}},
    "files text": {"files": {"optimizer.pt": "x"}, "facts": {}},
    "files nothing": {"files": {"optimizer.pt": None}, "facts": {}},
    "an entry of other keys": {"files": {"optimizer.pt": {"size": 1}}, "facts": {}},
    "a size that is text": {"files": {"optimizer.pt": ENTRY | {"size": "1"}}, "facts": {}},
    "facts a list": {"files": {}, "facts": []},
    "no facts": {"files": {}},
    "no files": {"files": {}, "facts": {}},
    "a name that climbs": {"files": {"../checkpoint-3/optimizer.pt": ENTRY}, "facts": {}},
    "a name that is absolute": {"files": {"/etc/passwd": ENTRY}, "facts": {}},
    "a name of nothing": {"files": {"": ENTRY}, "facts": {}},
    "a name that no file can have": {"files": {"a\0b": ENTRY}, "facts": {}},
    "a name that is too long": {"files": {"a" * 5000: ENTRY}, "facts": {}},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_of_another_form_is_passed_over(recipe: Recipe, name: str) -> None:
    folder = Path(recipe.output_dir)
    write_manifest(folder / "checkpoint-4", MANIFESTS[name])
    newest, broken = newest_valid(folder)
    assert newest == folder / "checkpoint-3"
    assert len(broken) == 1


def test_facts_of_another_form_are_differences(recipe: Recipe) -> None:
    folder = Path(recipe.output_dir)
    newest = folder / "checkpoint-4"
    content = json.loads((newest / MANIFEST).read_text())
    write_manifest(newest, {"files": content["files"], "facts": {"recipe": 3, "versions": [], "x": {}}})
    with pytest.raises(CheckpointError, match=r"the run would not go on exactly as it was"):
        run.train(recipe, SILENT)


def link_out(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [link_out, link_to_itself, pipe, directory, gone])
def test_a_manifest_that_is_no_file_of_the_checkpoint_is_passed_over(
    recipe: Recipe, spoil: Callable[[Path], None]
) -> None:
    folder = Path(recipe.output_dir)
    spoil(folder / "checkpoint-4" / MANIFEST)
    newest, broken = newest_valid(folder)
    assert newest == folder / "checkpoint-3"
    assert len(broken) == 1


@pytest.mark.parametrize("file", [MANIFEST, OPTIMIZER, STATE, RAW, "adapter_model.safetensors"])
def test_a_file_that_the_disk_does_not_give_back_is_passed_over(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = Path(recipe.output_dir)
    bad, real = folder / "checkpoint-4" / file, Path.open

    def broken(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    newest, errors = newest_valid(folder)
    assert newest == folder / "checkpoint-3"
    assert "Input/output error" in str(errors[0])


def test_names_that_are_no_checkpoints(recipe: Recipe) -> None:
    folder = Path(recipe.output_dir)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-²", "checkpoint-٣", "checkpoint-05", "checkpoint-5.tmp"):
        shutil.copytree(folder / "checkpoint-4", folder / name)
    shutil.copytree(folder / "checkpoint-4", folder / f"checkpoint-{'9' * 200}")
    (folder / "checkpoint-8").write_text("a file")
    (folder / "checkpoint-7").symlink_to(folder / "nowhere")
    (folder / "checkpoint--1").mkdir()
    assert resume.choose(recipe, SILENT) == folder / "checkpoint-4"
    resume.tidy(folder, folder / "checkpoint-4", SILENT)
    assert not list(folder.glob("earlier-*"))


def test_the_checkpoint_that_is_resumed_is_never_moved(recipe: Recipe) -> None:
    """Renamed by its owner, it holds an earlier step than its name says; the run goes on and writes that one anew."""
    folder = Path(recipe.output_dir)
    kept = folder / "kept"
    shutil.copytree(folder / "checkpoint-2", kept)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "checkpoint-2").rename(folder / "checkpoint-4")
    for spelling in (folder / "checkpoint-4", folder / ".." / "run" / "checkpoint-4"):
        resume.tidy(folder, spelling, SILENT)
        assert (folder / "checkpoint-4").is_dir()
    result = run.train(
        recipe.model_copy(update={"resume_from_checkpoint": str(folder / "checkpoint-4"), "save_total_limit": 1}),
        SILENT,
    )
    assert result.metrics["steps"] == 4
    assert newest_valid(folder)[0] == folder / "checkpoint-4"
    check_directory(folder / "checkpoint-4")
    moved = sorted(path.relative_to(folder).as_posix() for path in folder.glob("earlier-*/*"))
    assert moved == ["earlier-1/checkpoint-3", "earlier-2/checkpoint-4"]
    assert (folder / "earlier-2" / "checkpoint-4" / OPTIMIZER).read_bytes() == (kept / OPTIMIZER).read_bytes()


@pytest.mark.parametrize("name", [".partial", ".removed"])
@pytest.mark.parametrize("spoil", ["file", "link", "directory"])
def test_odd_leftovers_go_and_what_they_point_to_stays(recipe: Recipe, tmp_path: Path, name: str, spoil: str) -> None:
    folder = Path(recipe.output_dir)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    match spoil:
        case "file":
            (folder / name).write_text("x")
        case "link":
            (folder / name).symlink_to(tmp_path / "mine")
        case _:
            (folder / name / "checkpoint-9").mkdir(parents=True)
    resume.tidy(folder, folder / "checkpoint-4", SILENT)
    assert not os.path.lexists(folder / name)
    assert (tmp_path / "mine" / "file").read_text() == "mine"
