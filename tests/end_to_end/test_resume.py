"""Going on with a run: exactly, or not at all without saying so. And how a run that cannot go on ends."""

import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rankwise.cli import app
from rankwise.errors import (
    BrokenFile,
    CheckpointError,
    OutOfMemory,
    RecipeError,
    RunLocked,
    RunStopped,
    SpecMismatch,
    TrainingError,
    WriteError,
)
from rankwise.train import recipe as recipes
from rankwise.train.run import run
from rankwise.train.run.lock import only_writer
from rankwise.train.trainer.checkpoints import checkpoints
from rankwise.train.trainer.progress import ProgressBar

SILENT = Console(quiet=True)


@pytest.fixture
def make(tiny: Path, pairs_file: Path, tmp_path: Path):
    def make(**changes):
        values = {
            "model": str(tiny),
            "data": str(pairs_file),
            "rank": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "save_steps": 2,
            "logging_steps": 1,
            "output_dir": str(tmp_path / "run"),
        }
        return recipes.parse(values | changes)

    return make


@pytest.fixture
def at_step(monkeypatch):
    """Have something done once, when a step is over."""

    def at_step(step, action):
        plain, done = ProgressBar.on_step_end, []

        def noticed(self, args, state, control, **kwargs):
            plain(self, args, state, control, **kwargs)
            if state.global_step == step and not done:
                done.append(step)
                action()

        monkeypatch.setattr(ProgressBar, "on_step_end", noticed)

    return at_step


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(found: Path, expected: Path) -> bool:
    a, b = weights(found), weights(expected)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(run_dir)]


# ------------------------------------------------------------------------------------------------------- exact, or not


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2, "gradient_accumulation_steps": 3, "max_steps": 5},
        {"dropout": 0.2, "eval_split": 8, "max_steps": -1, "num_train_epochs": 2.0, "save_steps": 8},
        {"dropout": 0.2, "variant": {"name": "adalora", "delta_t": 1}},
    ],
    ids=["in the middle of an epoch", "at the end of an epoch, before it is evaluated", "adalora"],
)
def test_a_run_stopped_by_sigterm_resumes_bit_for_bit(make, tmp_path, at_step, changes):
    whole = run.train(make(**changes, output_dir=str(tmp_path / "whole")), SILENT)
    at_step(3 if "eval_split" not in changes else 8, sigterm)
    with pytest.raises(RunStopped, match=r"SIGTERM came, so the run stopped after step \d of \d+ and saved it"):
        run.train(make(**changes), SILENT)
    resumed = run.train(make(**changes, resume_from_checkpoint=True), SILENT)
    assert same(resumed.adapter, whole.adapter)
    losses = [[(row["step"], row["loss"]) for row in r.history if "loss" in row] for r in (resumed, whole)]
    assert losses[0] == losses[1]


def test_evaluations_change_nothing(make, tmp_path):
    often = run.train(make(dropout=0.2, eval_data=make().data, eval_steps=1), SILENT)
    never = run.train(make(dropout=0.2, output_dir=str(tmp_path / "never")), SILENT)
    assert same(often.adapter, never.adapter)


def test_the_log_has_every_step_once(make, tmp_path, at_step):
    at_step(3, sigterm)
    with pytest.raises(RunStopped):
        run.train(make(logging_steps=1), SILENT)
    (tmp_path / "run" / "log.jsonl").write_text("what a killed writer left")
    console = Console(width=1000, record=True)
    resumed = run.train(make(logging_steps=1, resume_from_checkpoint=True), console)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows == resumed.history
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_gib"] > 0 for row in rows if "loss" in row)
    said = console.export_text()  # of no terminal: a line for each
    assert re.search(r"step 6/6  loss \d\.\d{4}  gradient norm \S+  learning rate \S+  [\d,]+ tokens/s", said)


def test_a_run_killed_after_its_last_step_is_finished(make, tmp_path):
    whole = run.train(make(), SILENT)
    kept = weights(whole.adapter)
    for file in [*whole.adapter.iterdir(), tmp_path / "run" / "metrics.json", whole.curve]:
        file.unlink()
    resumed = run.train(make(resume_from_checkpoint=True), SILENT)
    found = weights(resumed.adapter)
    assert all(torch.equal(found[key], kept[key]) for key in kept)
    assert resumed.metrics["steps"] == 6
    assert resumed.curve.is_file()


def test_a_cut_newest_checkpoint_is_named_and_the_one_before_taken(make, tmp_path):
    whole = run.train(make(), SILENT)
    expected = weights(whole.adapter)
    cut = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    content = cut.read_bytes()[:100]
    cut.write_bytes(content)
    console = Console(width=1000, record=True)
    resumed = run.train(make(resume_from_checkpoint=True), console)
    text = console.export_text()
    assert f"Passed over a broken checkpoint: {cut}: expected" in text
    assert "found 100: it was cut or overwritten" in text
    assert resumed.prepared.checkpoint == tmp_path / "run" / "checkpoint-4"
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(resumed.adapter).items())
    moved = tmp_path / "run" / "earlier-1" / "checkpoint-6" / "optimizer.pt"
    assert moved.read_bytes() == content  # never deleted


def test_a_missing_file_is_named(make, tmp_path):
    run.train(make(max_steps=2), SILENT)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rankwise_state.safetensors"):
        (checkpoint / name).rename(tmp_path / name)
        named = rf"checkpoint-2: cannot resume exactly, {re.escape(name)} not found there"
        with pytest.raises(BrokenFile, match=named):
            run.prepare(run.load(make(max_steps=2, resume_from_checkpoint=str(checkpoint)), SILENT), SILENT)
        with pytest.raises(CheckpointError, match=rf"found 1, all broken: .*{re.escape(name)} not found there"):
            run.prepare(run.load(make(max_steps=2, resume_from_checkpoint=True), SILENT), SILENT)
        (tmp_path / name).rename(checkpoint / name)


def test_what_would_change_the_steps_is_refused_line_by_line(make, tmp_path):
    run.train(make(max_steps=2), SILENT)
    other = tmp_path / "other.jsonl"
    rows = Path(make().data).read_text().splitlines(keepends=True)
    other.write_text("".join([*rows[:-1], rows[-1].replace("39 is", "93 is")]))
    changed = make(max_steps=4, learning_rate=3e-3, seed=5, data=str(other), resume_from_checkpoint=True)
    with pytest.raises(SpecMismatch) as refused:
        run.prepare(run.load(changed, SILENT), SILENT)
    lines = str(refused.value).splitlines()
    assert lines[0].endswith("checkpoint-2: the run would not go on exactly as it was:")
    assert lines[1:4] == ["  learning_rate: was 0.01, is 0.003", "  max_steps: was 2, is 4", "  seed: was 0, is 5"]
    assert re.fullmatch(r"  training data: was '40 samples, SHA-256 \w+', is '40 samples, SHA-256 \w+'", lines[4])
    assert "resume_anyway: true (--resume-anyway)" in lines[5]

    console = Console(width=1000, record=True)
    resumed = run.train(changed.model_copy(update={"resume_anyway": True}), console)
    said = console.export_text()
    assert "resuming, although not exactly" in said
    assert "learning_rate: was 0.01, is 0.003" in said
    assert resumed.metrics["steps"] == 4


def test_another_number_of_processes_device_or_version_is_refused(make, tmp_path, monkeypatch):
    run.train(make(max_steps=2), SILENT)
    import rankwise.train.trainer.exact_resume as exact_resume

    plain = exact_resume.facts

    def elsewhere(*args, **kwargs):
        facts = plain(*args, **kwargs | {"processes": 2, "device": "cuda"})
        return facts | {"versions": facts["versions"] | {"torch": "9.9"}}

    monkeypatch.setattr(exact_resume, "facts", elsewhere)
    with pytest.raises(SpecMismatch) as refused:
        run.prepare(run.load(make(max_steps=2, resume_from_checkpoint=True), SILENT), SILENT)
    text = str(refused.value)
    assert "processes: was 1, is 2" in text
    assert "device: was 'cpu', is 'cuda'" in text
    assert re.search(r"torch: was '2\.\S+', is '9\.9'", text)


def test_another_base_under_the_same_name_is_refused(make, tmp_path, tiny):
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    run.train(make(model=str(copy), max_steps=2), SILENT)
    changed = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight *= 1.001
    changed.save_pretrained(copy)
    with pytest.raises(SpecMismatch, match=r"base weights: was 'SHA-256 \w+', is 'SHA-256 \w+'"):
        run.prepare(run.load(make(model=str(copy), max_steps=2, resume_from_checkpoint=True), SILENT), SILENT)


def test_what_does_not_change_the_steps_may_change(make, tmp_path):
    whole = run.train(make(output_dir=str(tmp_path / "whole")), SILENT)
    copy = tmp_path / "moved.jsonl"
    copy.write_bytes(Path(make().data).read_bytes())
    changes = {"data": str(copy), "save_steps": 1, "save_total_limit": 2, "logging_steps": 3, "eval_data": str(copy)}
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run.train(make(**changes, resume_from_checkpoint=checkpoint), SILENT)
    assert same(resumed.adapter, whole.adapter)
    assert names(tmp_path / "run") == ["checkpoint-6", "checkpoint-5"]


def test_a_new_run_leaves_the_checkpoints_of_the_one_before(make, tmp_path):
    run.train(make(), SILENT)
    run.train(make(max_steps=2), SILENT)
    assert names(tmp_path / "run") == ["checkpoint-2"]
    earlier = tmp_path / "run" / "earlier-1"
    assert names(earlier) == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert json.loads((earlier / "metrics.json").read_text())["steps"] == 6
    assert {path.name for path in earlier.iterdir()} - set(names(earlier)) == {
        *("adapter", "loss.png", "report.html", "report.json", "metrics.json", "log.jsonl"),
    }
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"found none\..* Those of earlier runs are in earlier-1\."):
        run.prepare(run.load(make(resume_from_checkpoint=True), SILENT), SILENT)


# ----------------------------------------------------------------------------------------------- how a run may be ended


@pytest.mark.parametrize(("ask", "code"), [(sigterm, 143), (ctrl_c, 130)])
def test_a_signal_on_the_command_line_saves_and_has_its_own_exit_code(make, tmp_path, at_step, ask, code):
    path = tmp_path / "recipe.yaml"
    values = make().model_dump(exclude_defaults=True)
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    at_step(3, ask)
    stopped = CliRunner().invoke(app, ["train", str(path)], env={"COLUMNS": "200"})
    assert stopped.exit_code == code, stopped.output
    assert "stopped after step 3 of 6" in " ".join(stopped.output.split())
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-2"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    resumed = CliRunner().invoke(app, ["train", str(path), "--resume-from-checkpoint", "true"])
    assert resumed.exit_code == 0, resumed.output


def test_a_second_ctrl_c_stops_at_once_and_leaves_all_whole(make, tmp_path, at_step):
    def twice():
        ctrl_c()
        ctrl_c()

    at_step(3, twice)
    with pytest.raises(KeyboardInterrupt):
        run.train(make(), SILENT)
    with only_writer(tmp_path / "run", SILENT):  # it is free again
        assert names(tmp_path / "run") == ["checkpoint-2"]


HOLDER = """
import sys, time
from rich.console import Console
from rankwise.train.run.lock import only_writer
with only_writer(sys.argv[1], Console(quiet=True)):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_writers_on_one_directory(make, tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        here = rf"in use by process {holder.pid} on {re.escape(platform.node())} \(since 20"
        with pytest.raises(RunLocked, match=here):
            run.prepare(run.load(make(), SILENT), SILENT)
        with pytest.raises(RunLocked, match=here), only_writer(folder, SILENT):
            pass
        holder.kill()
    console = Console(width=1000, record=True)
    run.train(make(max_steps=1), console)
    said = console.export_text()
    assert re.search(rf"was left locked by process {holder.pid} on .*, which no longer runs; going on", said)


def test_a_lock_of_another_machine_is_not_taken_over(make, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    holder = folder / "run-holder.json"
    holder.write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": "2026-01-01"}))
    with pytest.raises(RunLocked, match=r"process 7 on elsewhere .*if that machine no longer runs it, remove .*holder"):
        run.prepare(run.load(make(), SILENT), SILENT)
    holder.unlink()
    run.train(make(max_steps=1), SILENT)
    assert not holder.exists()


# ------------------------------------------------------------------------------------------------ what a run dies of


def poisoned(prepared, sample, value=float("nan")):
    """The model's answer to one training sample becomes NaN."""
    wanted = torch.tensor(prepared.trainer.train_dataset[sample]["input_ids"])

    def hook(module, args, output):
        (ids,) = args
        for row in range(len(ids)):
            if torch.equal(ids[row, : len(wanted)], wanted):
                output = output.clone()
                output[row] *= value
        return output

    return prepared.model.get_input_embeddings().register_forward_hook(hook)


def test_nan_stops_with_the_step_the_samples_and_the_last_good_checkpoint(make, tmp_path):
    prepared = run.prepare(run.load(make(gradient_accumulation_steps=2, max_steps=20), SILENT), SILENT)
    hook = poisoned(prepared, 17)
    with pytest.raises(TrainingError) as stopped:
        run.execute(prepared, SILENT)
    hook.remove()
    text = str(stopped.value)
    found = re.match(r"step (\d+): expected a finite loss, found nan, on the training samples ([\d, ]+) \(", text)
    assert found, text
    samples = [int(number) for number in found[2].split(",")]
    assert 18 in samples and len(samples) == 4
    step = int(found[1])
    saved = (step - 1) // 2 * 2
    good = f"The last good checkpoint is {tmp_path / 'run' / f'checkpoint-{saved}'}." if saved else "no checkpoint yet"
    assert good in text
    assert "lower learning_rate (now 0.01)" in text


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make, tmp_path):
    prepared = run.prepare(run.load(make(gradient_accumulation_steps=2), SILENT), SILENT)
    steps = 0

    def overflow(gradient):
        nonlocal steps
        steps += 1
        return gradient * float("inf") if steps == 5 else gradient  # the first batch of the third step

    tensor = run.rw.trainable_parameters(prepared.model)[0]
    tensor.register_hook(overflow)
    with pytest.raises(TrainingError, match=r"step 3: expected a finite gradient norm, found (nan|inf)") as stopped:
        run.execute(prepared, SILENT)
    assert len(re.findall(r"\d+", str(stopped.value).split("samples ")[1].split("(")[0])) == 8
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'}." in str(stopped.value)
    assert bool(torch.isfinite(tensor).all())


def test_weights_that_overflowed_are_not_saved(make, tmp_path, at_step):
    prepared = run.prepare(run.load(make(), SILENT), SILENT)

    def overflow():
        with torch.no_grad():
            run.rw.trainable_parameters(prepared.model)[0].fill_(float("inf"))

    at_step(4, overflow)
    with pytest.raises(TrainingError, match=r"step 4: expected finite adapter weights.*checkpoint is .*checkpoint-2"):
        run.execute(prepared, SILENT)
    assert names(tmp_path / "run") == ["checkpoint-2"]


def test_out_of_memory_is_named(make, tmp_path):
    prepared = run.prepare(run.load(make(), SILENT), SILENT)
    calls = 0

    def allocate(module, args, output):
        nonlocal calls
        calls += 1
        # More than any machine has: the allocator itself refuses.
        return output + torch.empty(2**60, dtype=torch.int8)[0] if calls == 4 else output

    prepared.model.get_input_embeddings().register_forward_hook(allocate)
    with pytest.raises(OutOfMemory) as stopped:
        run.execute(prepared, SILENT)
    text = str(stopped.value)
    assert re.match(r"step 4: out of memory on cpu with a batch of 4 samples of \d\d tokens \(", text), text
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'}." in text
    assert "lower per_device_train_batch_size and raise gradient_accumulation_steps" in text
    assert "set gradient_checkpointing: true; lower max_length (now 1024)" in text


def test_a_file_that_may_not_grow_stops_the_run_and_loses_nothing(make, tmp_path, at_step):
    """The kernel refuses to write more than 20 kB into a file: torch's own writer meets it as it would a full disk."""
    whole = run.train(make(output_dir=str(tmp_path / "whole")), SILENT)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1])))
    try:
        with pytest.raises(CheckpointError) as stopped:
            run.train(make(), SILENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    text = str(stopped.value)
    assert "checkpoint-4 could not be written (" in text
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'}. Make room on the disk" in text
    assert names(tmp_path / "run") == ["checkpoint-2"]
    resumed = run.train(make(resume_from_checkpoint=True), SILENT)
    assert same(resumed.adapter, whole.adapter)


@pytest.mark.parametrize("step", [0, 3, 7, 12, 18, 26, 40])
def test_a_disk_that_is_full_at_the_end_of_a_run_is_named(make, tmp_path, monkeypatch, step):
    """From some flush after training on: the adapter, its card, the page, the numbers. Then there is room again."""
    prepared = run.prepare(run.load(make(max_steps=1), SILENT), SILENT)
    real, plain, left = os.fsync, run._written, iter(range(step))

    def full(handle):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        real(handle)

    def written(*arguments):
        monkeypatch.setattr(os, "fsync", full)
        return plain(*arguments)

    monkeypatch.setattr(run, "_written", written)
    try:
        run.execute(prepared, SILENT)
    except WriteError as error:
        assert "could not be written ([Errno 28] No space left" in str(error)
    monkeypatch.undo()
    folder = tmp_path / "run"
    assert not list(folder.glob(".*"))
    if (folder / "adapter").exists():
        assert (folder / "adapter" / "README.md").exists()
        assert same(folder / "adapter", folder / "checkpoint-1")


def test_an_output_dir_that_cannot_be_one_is_named_and_a_link_followed(make, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loose").symlink_to(tmp_path / "nowhere")
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    monkeypatch.setattr(run.adapter_start, "attach", None)  # it does not come to that
    for name, message in {"file": "is a file", "file/run": "is a file", "loose/run": "is a link to"}.items():
        with pytest.raises(RecipeError, match=rf"{tmp_path / name}: expected a directory, or a new .*{message}"):
            run.prepare(run.load(make(output_dir=str(tmp_path / name)), SILENT), SILENT)
    with monkeypatch.context() as patch, pytest.raises(RecipeError, match=r"/proc may not be written to"):
        patch.setattr(os, "access", lambda path, mode: str(path) != "/proc")  # root may, until it tries
        run.prepare(run.load(make(output_dir="/proc/nothing"), SILENT), SILENT)
    with pytest.raises(WriteError, match=r"/proc/nothing: could not be written"):
        run.prepare(run.load(make(output_dir="/proc/nothing"), SILENT), SILENT)
    monkeypatch.undo()
    run.train(make(max_steps=1, output_dir=str(tmp_path / "link")), SILENT)
    assert (tmp_path / "far" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()


def test_twenty_runs_started_at_once_in_one_directory(make, tmp_path, monkeypatch):
    """One trains; the others, which come while it does, end with the error that names it."""
    prepared = run.prepare(run.load(make(max_steps=1), SILENT), SILENT)
    plain, (ready, go), (end, stop), (told, tell) = run._written, os.pipe(), os.pipe(), os.pipe()

    def written(*arguments):
        os.read(end, 1)  # until all others have come
        return plain(*arguments)

    monkeypatch.setattr(run, "_written", written)
    children = []
    for number in range(20):
        child = os.fork()
        if not child:
            os.close(go)
            os.close(stop)
            outcome = "nothing"
            try:
                os.read(ready, 1)  # the pipe is closed: all at once
                run.execute(prepared, SILENT)
                outcome = "trained"
            except RunLocked as error:
                outcome = str(error)
            finally:
                (tmp_path / f"outcome-{number}").write_text(outcome)
                os.write(tell, b"x")
                os._exit(0)
        children.append(child)
    os.close(go)
    refused = 0
    while refused < 19:
        refused += len(os.read(told, 19))
    os.close(stop)
    for child in children:
        os.waitpid(child, 0)
    outcomes = [(tmp_path / f"outcome-{number}").read_text() for number in range(20)]
    assert outcomes.count("trained") == 1
    winner = children[outcomes.index("trained")]
    named = re.compile(rf"run: expected to be its only writer, found it in use by process {winner} on .* \(since 20")
    assert sum(bool(named.search(outcome)) for outcome in outcomes) == 19
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert not list((tmp_path / "run").glob(".*"))
