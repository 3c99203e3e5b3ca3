"""Fill docs/reliability.md: each fault, what happens, and the tests that cause it. A test that is gone is an error.

python scripts/reliability.py            # rewrite
python scripts/reliability.py --check    # exit 1 if it is out of date, or names a test that is not there
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reliability.md"


class Fault(NamedTuple):
    """A fault, what happens then, and the tests that cause it: path under tests/ :: function."""

    fault: str
    outcome: str
    tests: tuple[str, ...]


_RESUME, _TINY = "end_to_end/test_resume.py", "end_to_end/test_train_tiny.py"
_FORMS, _WRITTEN = "unit/test_data.py", "unit/test_checkpoints.py"
_BAD = "unit/test_bad_checkpoints.py::test_a_bad_directory_is_refused_and_the_model_left_as_it_was"
_MERGED = "end_to_end/test_merged_directory.py"
_DISK, _POWER = "unit/test_disk.py", "unit/test_power_loss.py"
_DIRECTORIES = "end_to_end/test_bad_run_directories.py"
_LOCK, _PLACES = "unit/test_run_lock.py", "unit/test_writing_places.py"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "SIGKILL while saving",
        "The checkpoint before is whole and is resumed from, with the same end bit for bit.",
        ("end_to_end/test_kills.py::test_runs_killed_at_random",
         "end_to_end/test_kills.py::test_killed_and_disk_full_at_every_operation"),
    ),
    Fault(
        "Disk full while saving",
        "The run stops with an error; the files before are as they were.",
        ("end_to_end/test_kills.py::test_killed_and_disk_full_at_every_operation",
         f"{_RESUME}::test_a_file_that_may_not_grow_stops_the_run_and_loses_nothing",
         "unit/test_bad_checkpoints.py::test_a_full_disk_leaves_the_previous_file"),
    ),
    Fault(
        "Power lost while saving, at any moment",
        "What was not flushed is lost, cut or there, and any name changed since: the old checkpoint or adapter, or the "
        "new one, whole.",
        (f"{_POWER}::test_a_checkpoint", f"{_POWER}::test_an_adapter_saved_over_another",
         f"{_POWER}::test_a_directory_that_switches_as_a_whole"),
    ),
    Fault(
        "An adapter saved over another: killed, or read meanwhile",
        "The old one or the new one, never parts of both; what a dead process left goes with the next write.",
        ("end_to_end/test_resaves.py::test_an_adapter_that_is_saved_over_and_over_is_never_mixed_nor_lost",
         f"{_DISK}::test_a_disk_that_fails_at_any_moment_of_a_save", f"{_DISK}::test_several_writers_take_turns",
         f"{_DISK}::test_what_dead_processes_left_goes_with_the_next_write_and_what_live_ones_have_stays"),
    ),
    Fault(
        "Newest checkpoint truncated",
        "It is named and set aside; the one before is taken.",
        (f"{_WRITTEN}::test_each_file_cut_at_many_offsets_is_named_and_the_previous_checkpoint_taken",
         f"{_RESUME}::test_a_cut_newest_checkpoint_is_named_and_the_one_before_taken"),
    ),
    Fault(
        "Newest checkpoint bad in any other way: not given back by the disk, a manifest or state of another form, linked, "
        "oddly named",
        "It is passed over and set aside; one that is named is a `CheckpointError`. The one that is resumed is never moved.",
        (f"{_DIRECTORIES}::test_a_spoilt_newest_checkpoint_is_passed_over",
         f"{_DIRECTORIES}::test_what_only_loading_tells_is_named",
         f"{_DIRECTORIES}::test_a_manifest_of_another_form_is_passed_over",
         f"{_DIRECTORIES}::test_a_manifest_that_is_no_file_of_the_checkpoint_is_passed_over",
         f"{_DIRECTORIES}::test_a_file_that_the_disk_does_not_give_back_is_passed_over",
         f"{_DIRECTORIES}::test_names_that_are_no_checkpoints",
         f"{_DIRECTORIES}::test_odd_leftovers_go_and_what_they_point_to_stays",
         f"{_DIRECTORIES}::test_the_checkpoint_that_is_resumed_is_never_moved"),
    ),
    Fault(
        "Optimizer, scheduler or generator state missing",
        "The missing file is named.",
        (f"{_RESUME}::test_a_missing_file_is_named", f"{_WRITTEN}::test_each_missing_file_is_named"),
    ),
    Fault(
        "Resume with changed configuration, data or world size",
        "Refused, with each difference on a line.",
        (f"{_RESUME}::test_what_would_change_the_steps_is_refused_line_by_line",
         f"{_RESUME}::test_another_number_of_processes_device_or_version_is_refused"),
    ),
    Fault(
        "Two writers on one run directory",
        "The second is refused.",
        (f"{_RESUME}::test_two_writers_on_one_directory",
         f"{_RESUME}::test_a_lock_of_another_machine_is_not_taken_over"),
    ),
    Fault(
        "Twenty starts at once in one directory",
        "One wins; nineteen end with `RunLocked`, which names the winner.",
        (f"{_RESUME}::test_twenty_runs_started_at_once_in_one_directory",
         f"{_LOCK}::test_of_twenty_starts_at_once_one_wins_and_the_others_are_told_who"),
    ),
    Fault(
        "Lock or its record malformed, a link, or a directory",
        "A record that is none counts for nothing; what cannot be locked is a `WriteError`.",
        (f"{_LOCK}::test_a_record_of_the_holder_that_is_none_counts_for_nothing",
         f"{_LOCK}::test_a_directory_in_the_place_of_the_lock_or_its_record_is_named",
         f"{_LOCK}::test_a_lock_that_is_a_link_is_not_followed"),
    ),
    Fault(
        "Disk full outside checkpoints: adapter, card, page, curve, numbers, merged model, ranks",
        "`WriteError`; what was there is whole.",
        (f"{_PLACES}::test_a_full_disk_is_named_and_leaves_what_was_there",
         f"{_RESUME}::test_a_disk_that_is_full_at_the_end_of_a_run_is_named",
         f"{_MERGED}::test_a_full_disk_is_named_and_leaves_nothing"),
    ),
    Fault(
        "`output_dir` or `--out` a file, not to be written to, behind a link, a mount point",
        "Through a link it is written; the rest is named before any work.",
        (f"{_PLACES}::test_a_place_that_can_be_no_directory_is_named_before_any_work",
         f"{_RESUME}::test_an_output_dir_that_cannot_be_one_is_named_and_a_link_followed",
         f"{_MERGED}::test_a_place_that_cannot_be_replaced_is_named_before_any_work"),
    ),
    Fault(
        "`~` in a path",
        "The user's home, in every path of recipe and command line.",
        ("unit/test_recipe.py::test_a_users_home_is_meant_in_every_path",
         "unit/test_cli.py::test_a_users_home_is_meant_in_every_path"),
    ),
    Fault(
        "SIGTERM",
        "The step is ended, saved, and the run leaves with an exit code of its own.",
        (f"{_RESUME}::test_a_run_stopped_by_sigterm_resumes_bit_for_bit",
         f"{_RESUME}::test_sigterm_on_the_command_line_saves_and_has_its_own_exit_code"),
    ),
    Fault(
        "Out of memory at step N",
        "`OutOfMemory` names the step, the batch and the device.",
        (f"{_RESUME}::test_out_of_memory_is_named",),
    ),
    Fault(
        "NaN or infinity in loss or gradient, during initialisation too",
        "The run stops before the weights are touched, and says at which step and samples; a layer is named.",
        (f"{_RESUME}::test_nan_stops_with_the_step_the_samples_and_the_last_good_checkpoint",
         f"{_RESUME}::test_a_gradient_that_is_not_finite_never_reaches_the_weights",
         "end_to_end/test_check.py::test_a_base_that_is_not_finite_stops_before_any_step",
         "unit/test_gradients.py::test_a_loss_that_is_not_finite",
         "unit/test_gradients.py::test_a_gradient_that_is_not_finite_though_the_loss_is",
         "unit/test_adapters.py::test_a_layer_without_gradient_or_with_a_bad_one_leaves_the_model_as_it_was"),
    ),
    Fault(
        "Every label masked, by truncation too",
        "`NoTrainableTokens` before training; where some samples are, they are counted.",
        (f"{_TINY}::test_labels_all_masked_by_truncation_are_refused",
         f"{_TINY}::test_labels_masked_in_some_samples_are_said"),
    ),
    Fault(
        "Chat template without generation marks",
        "`DataError` says what to add.",
        (f"{_TINY}::test_chats_without_marks_in_the_template_are_refused",),
    ),
    Fault(
        "pad = eos, the end of a turn never trained",
        "Labels are masked by what is padding, not by what it is padded with: the end of an answer is trained. "
        "Where no answer trains one, `DataError` before the first step.",
        (f"{_TINY}::test_the_end_is_trained_where_padding_is_the_same_token",
         "end_to_end/test_check.py::test_answers_that_never_end_are_refused",
         "end_to_end/test_check.py::test_padding_that_hides_the_end_is_refused"),
    ),
    Fault(
        "Malformed, empty or mixed JSONL",
        "`DataError` with the file and the line.",
        (f"{_FORMS}::test_bad_jsonl_is_named_by_its_line", f"{_FORMS}::test_bad_sources_are_named",
         f"{_TINY}::test_a_broken_line_is_named"),
    ),
    Fault(
        "Unknown or misspelt configuration key",
        "`RecipeError` or `SpecError` offers the nearest name.",
        ("unit/test_recipe.py::test_an_unknown_key_names_the_file_and_the_nearest_field",
         "unit/test_spec.py::test_unknown_keys_are_refused_with_the_nearest_name"),
    ),
    Fault(
        "No module matched, or some names of the list matched none",
        "`TargetError` lists them, the nearest name and what the model has.",
        ("unit/test_planning.py::test_what_cannot_be_served_is_refused_and_the_model_left_alone",
         "unit/test_planning.py::test_a_model_without_linear_layers"),
    ),
    Fault(
        "Adapter and base do not fit: layout, shape, vocabulary, weights",
        "`ShapeMismatch` or `BaseMismatch` with both sides; the base is known by a probe of its weights.",
        ("unit/test_bad_checkpoints.py::test_another_bases_weights",
         "unit/test_bad_checkpoints.py::test_a_base_of_other_shape_or_names", _BAD),
    ),
    Fault("Missing, extra or half-paired A and B", "`MissingTensor` or `UnexpectedTensor` with the name.", (_BAD,)),
    Fault(
        "alpha NaN, negative or huge; r ≤ 0, above min(in, out), 10⁹ or a string",
        "`SpecError` names field and value; a rank that a file's tensors do not have is a `ShapeMismatch`.",
        (_BAD, "unit/test_spec.py::test_bad_fields_are_refused_by_name",
         "unit/test_planning.py::test_what_cannot_be_served_is_refused_and_the_model_left_alone"),
    ),
    Fault(
        "Pathological regular expression",
        "`TargetError` after two seconds of computing; the expression runs in a process that is stopped.",
        ("unit/test_patterns.py::test_one_that_would_take_forever_is_stopped",
         "unit/test_patterns.py::test_a_spec_with_such_a_pattern_is_refused_and_the_model_left_alone",
         "unit/test_inspection.py::test_a_hostile_file_takes_neither_memory_nor_time", _BAD),
    ),
    Fault(
        "Smuggled full tensors",
        "`UnexpectedTensor`, unless `modules_to_save` names their module; `load(..., modules_to_save=())` refuses "
        "these too, and `inspect` lists them.",
        (_BAD, "unit/test_inspection.py::test_whole_modules_can_be_refused_or_allowed_by_name"),
    ),
    Fault(
        "Oversized header, LFS pointer, truncated safetensors, duplicate JSON keys",
        "`BrokenFile` says which; the header is read and checked before any tensor.",
        (_BAD, "unit/test_bad_checkpoints.py::test_inspect_reports_what_load_refuses",
         "unit/test_mutated_checkpoints.py::test_bytes",
         "unit/test_mutated_checkpoints.py::test_values_of_the_configuration_and_of_the_header",
         "unit/test_fuzz.py::test_nothing_but_the_error_tree_comes_out_of_the_reader"),
    ),
    Fault(
        "Pickle files, code that comes with an adapter or a model",
        "Never opened, never run: `UnsafeFile`, `PretrainedError`, or a note of `inspect`.",
        (_BAD, "unit/test_inspection.py::test_what_it_does_not_open",
         f"{_MERGED}::test_a_base_that_a_strangers_adapter_names_runs_no_code",
         "unit/test_pretrained.py::test_pickled_weights_are_refused"),
    ),
    Fault(
        "Path traversal, links, absolute names",
        "`UnsafeFile` for a link that leaves the directory; the hub's cache, made of links, is read.",
        (_BAD, "unit/test_inspection.py::test_what_it_does_not_open",
         "unit/test_inspection.py::test_the_hubs_cache_is_read_through_its_links"),
    ),
    Fault(
        "Lossy merge: bf16, 4-bit, NaN",
        "What rounding lost is reported, per site and as a difference of outputs; past 70 % of the change, into a "
        "quantised base and with NaN it is refused. Nothing is changed or written then.",
        ("unit/test_merge.py::test_a_merge_that_loses_most_of_the_change_is_refused_unless_told",
         "unit/test_merge.py::test_a_base_that_is_not_finite", "unit/test_merge.py::test_a_change_that_is_not_finite",
         "unit/test_merge.py::test_a_sum_beyond_half_precision",
         "unit/test_quantised_bases.py::test_merging_into_a_quantised_weight_is_refused",
         f"{_MERGED}::test_a_lossy_merge_is_refused_unless_told",
         f"{_MERGED}::test_nothing_is_written_into_what_is_read",
         f"{_MERGED}::test_a_merge_that_is_cut_off_leaves_nothing"),
    ),
    Fault(
        "Stale or foreign gradient cache; initialisation interrupted",
        "The cache is refused by its hashes; the model is left as it was.",
        ("unit/test_gradient_cache.py::test_other_weights_batches_or_settings_are_refused",
         "unit/test_gradient_cache.py::test_an_interrupted_collection_leaves_no_trace",
         "unit/test_gradient_cache.py::test_files_that_are_no_cache_are_named",
         "end_to_end/test_start_alone.py::test_a_cache_of_other_settings_is_refused_before_training"),
    ),
)  # fmt: skip

_INTRODUCTION = """\
# Reliability

What can go wrong, what happens then, and the tests that make it go wrong. Every error is one of the tree in
`src/rankwise/errors.py` and says where, what was expected, what was found and what to do.

`rankwise inspect ADAPTER` says what is in a directory, without trusting any of it. `make fuzz` looks for inputs that
the reader of adapter directories does not survive.
"""


def missing_tests() -> list[str]:
    """The tests that the table names and that are not there."""
    named = {test for fault in FAULTS for test in fault.tests}
    return sorted(test for test in named if test.partition("::")[2] not in _functions(test.partition("::")[0]))


def _functions(path: str) -> set[str]:
    source = ROOT / "tests" / path
    if not source.is_file():
        return set()
    return {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}


def document() -> str:
    """docs/reliability.md."""
    rows = [
        f"| {number} | {fault.fault} | {fault.outcome or '(open)'} | {_links(fault.tests)} |"
        for number, fault in enumerate(FAULTS, 1)
    ]
    measured = _measured()
    head = ["| | fault | what happens | tests that cause it |", "| --- | --- | --- | --- |"]
    return "\n".join([_INTRODUCTION, *head, *rows, "", "## Measured", "", *measured, ""])


def _measured() -> list[str]:
    """The figures of the last long runs."""
    kills, fuzz = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in ("kills", "fuzz")
    )
    random, every = kills["at random"], kills["at every operation on the disk while a checkpoint is saved"]
    faults = sum(every["faults"].values())
    return [
        f"- `make soak`: {random['kills']} runs killed at random times, "
        f"{random['kills while a checkpoint was being written']} of them while a checkpoint was being written; "
        f"{random['checkpoints compared bit for bit']:,} checkpoints compared bit for bit; lost: "
        f"{random['checkpoints lost']} checkpoints, {random['bytes lost']} bytes. "
        f"{random['runs resumed to their end, bit for bit']} went on to their end, bit for bit that of a run without "
        "kills.",
        f"- {faults} faults at every single write, fsync and rename of a save: the process killed before it or half "
        "way through it, or the disk full. Lost: nothing.",
        f"- `python benchmarks/fuzz.py`: {fuzz['inputs tried']:,} inputs in {fuzz['seconds']} s, of which "
        f"{fuzz['inputs that reach new code']} reached code that none before had; "
        f"{fuzz['inputs that end in anything but a named error']} ended in anything but an adapter or a named error.",
    ]


def _links(tests: tuple[str, ...]) -> str:
    return "<br>".join(f"[{re.sub(r'^.*::test_', '', test)}](../tests/{test.partition('::')[0]})" for test in tests)


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if missing := missing_tests():
        sys.exit(f"no such tests: {', '.join(missing)}")
    if check and (not DOCUMENT.is_file() or DOCUMENT.read_text() != document()):
        sys.exit("docs/reliability.md is out of date; run python scripts/reliability.py")
    if not check:
        DOCUMENT.write_text(document())


if __name__ == "__main__":
    main()
