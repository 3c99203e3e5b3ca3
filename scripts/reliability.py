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


_API, _ENGINE = "unit/test_serve_api.py", "unit/test_serve_engine.py"
_RESUME, _TINY = "end_to_end/test_resume.py", "end_to_end/test_train_tiny.py"
_FORMS, _WRITTEN = "unit/test_data.py", "unit/test_checkpoints.py"
_CHATS, _TOKENS = "unit/test_chat.py", "unit/test_tokens.py"
_BAD = "unit/test_bad_checkpoints.py::test_a_bad_directory_is_refused_and_the_model_left_as_it_was"
_MEANING = "parity/test_peft_configurations.py"
_SECOND = "unit/test_second_derivatives.py"
_MEANING, _VOCABULARY = "parity/test_peft_configurations.py", "parity/test_vocabulary.py"
_HABIT = "parity/test_save_pretrained.py"
_MERGED = "end_to_end/test_merged_directory.py"
_KEPT = "unit/test_kept_outputs.py"
_UNUSED = "unit/test_unused_layers.py"
_LEFT_OUT = "unit/test_left_out.py"
_TORCH = "unit/test_torch_features.py"
_OFFLOADED = "unit/test_offloading.py"
_MERGED, _TEXT = "end_to_end/test_merged_directory.py", "end_to_end/test_hostile_text.py"
_YAML, _CONVOLUTIONS = "unit/test_yaml_text.py", "parity/test_convolutions.py"
_BASES = "unit/test_hostile_bases.py"
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
        "Newest checkpoint bad in any other way: unreadable, a manifest or state of another form, linked, oddly named",
        "It is passed over and set aside; where the recipe names it, it is a `CheckpointError`. What is resumed is "
        "never moved.",
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
        "A tracker that is not known, installed or set up",
        "`RecipeError` before the model is loaded.",
        ("unit/test_trackers.py::test_a_tracker_that_cannot_be_reported_to_is_named",),
    ),
    Fault(
        "`~` in a path",
        "The user's home, in every path of recipe and command line.",
        ("unit/test_recipe.py::test_a_users_home_is_meant_in_every_path",
         "unit/test_cli.py::test_a_users_home_is_meant_in_every_path"),
    ),
    Fault(
        "SIGTERM, Ctrl-C",
        "The step is ended, saved, and the run leaves with an exit code of its own.",
        (f"{_RESUME}::test_a_run_stopped_by_sigterm_resumes_bit_for_bit",
         f"{_RESUME}::test_a_signal_on_the_command_line_saves_and_has_its_own_exit_code"),
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
        "The answers are found by rendering with and without them, exactly as marked templates mark them; where a "
        "template renders an answer otherwise once others follow, `DataError` names the message.",
        (f"{_CHATS}::test_answers_are_found_in_unmarked_templates",
         f"{_CHATS}::test_answers_are_those_that_marked_templates_mark",
         f"{_CHATS}::test_an_answer_that_is_rendered_otherwise_later_is_refused",
         f"{_TINY}::test_chats_are_trained_on_the_answers_though_the_template_marks_none"),
    ),
    Fault(
        "Tools, calls, template options, system messages or history beside a sample",
        "They reach the model as they were written; what a template or a form has no place for is a `DataError` with "
        "file and line, and fields that are not looked at are named.",
        (f"{_TOKENS}::test_tools_reach_the_model_as_they_were_written",
         f"{_TOKENS}::test_template_options_reach_the_template", f"{_TOKENS}::test_alpacas_system_and_history",
         f"{_TOKENS}::test_a_system_field_is_a_system_message", f"{_CHATS}::test_what_a_template_leaves_out_is_refused",
         f"{_TOKENS}::test_fields_that_are_not_looked_at_are_named"),
    ),
    Fault(
        "A text, prompt or rendered chat that brings BOS or EOS along",
        "Each stands there once, in training, in `generate` and in the run's samples alike.",
        (f"{_TOKENS}::test_bos_stands_before_a_text_once", f"{_TOKENS}::test_bos_and_eos_stand_around_a_pair_once",
         f"{_TOKENS}::test_prompts_are_those_that_were_learnt",
         f"{_TOKENS}::test_an_answer_is_generated_from_the_prompts_tokens"),
    ),
    Fault(
        "A chat template that raises, or none",
        "`DataError` with the file, the line and what the template said.",
        (f"{_CHATS}::test_a_template_that_raises_is_named_with_the_place",
         f"{_TOKENS}::test_a_refusal_names_the_file_and_line", f"{_CHATS}::test_a_tokenizer_without_a_template"),
    ),
    Fault(
        "No end token; tokens beyond the embedding; a sample longer than the positions that a model has learned",
        "`DataError` names the sample and the token or length, before the first step.",
        ("unit/test_preflight.py::test_a_token_beyond_the_embedding_is_named",
         "unit/test_preflight.py::test_a_sample_longer_than_the_learned_positions_is_named",
         "unit/test_preflight.py::test_learned_positions_are_as_many_as_a_model_can_take",
         "end_to_end/test_check.py::test_what_the_model_cannot_take_is_refused_before_any_step",
         "end_to_end/test_check.py::test_samples_longer_than_learned_positions_are_refused_before_any_step"),
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
        "Malformed, empty, cut or mixed files: JSON, tables, Arrow, compressed",
        "`DataError` with the file and the line.",
        ("unit/test_files.py::test_broken_files_are_named", f"{_FORMS}::test_bad_jsonl_is_named_by_its_line",
         f"{_FORMS}::test_bad_sources_are_named",
         f"{_TINY}::test_a_broken_line_is_named"),
    ),
    Fault(
        "Values that readers guess at: dates, numbers as text, empty fields, labels, null in columns of objects",
        "Every kind of file gives the values that stand in it; labels keep their names; files larger than memory are "
        "read in pieces and kept on disk.",
        ("unit/test_files.py::test_every_kind_gives_the_values_that_stand_in_it",
         "unit/test_files.py::test_labels_keep_their_names",
         "unit/test_files.py::test_messages_of_arrow_have_their_own_fields_only",
         "unit/test_files.py::test_a_large_array_is_not_held_in_memory"),
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
        "Matched without backtracking, as `re` would; `TargetError` after a number of steps that is the same on every "
        "machine.",
        ("unit/test_patterns.py::test_one_that_would_take_forever_is_answered",
         "unit/test_patterns.py::test_random_expressions_match_what_re_matches",
         "unit/test_patterns.py::test_one_that_takes_too_many_steps_is_stopped_at_the_same_one_on_every_machine",
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
        "Second derivatives, torch.func, forward mode",
        "Those of the folded weights (DoRA's norm a constant, as its paper has it): Hessians and their products, "
        "gradient penalties, gradients per sample.",
        (f"{_SECOND}::test_hessian_vector_products",
         f"{_SECOND}::test_a_gradient_penalty_trains_what_the_dense_weights_would",
         f"{_SECOND}::test_transforms_of_the_parameters", f"{_SECOND}::test_gradients_per_sample",
         f"{_SECOND}::test_hessians_in_the_inputs", f"{_SECOND}::test_forward_mode_through_the_model"),
    ),
    Fault(
        "Offloaded and meta models, `device_map`, offloading after `attach`",
        "What is in memory works, on every device; a tensor on the meta device is refused by its name, as is the "
        "forward of a model whose adapters were offloaded. `plan` needs no tensors; merged first, it may be offloaded.",
        (f"{_OFFLOADED}::test_attach_to_an_offloaded_model", f"{_OFFLOADED}::test_offloaded_after_attach",
         f"{_OFFLOADED}::test_dispatched_without_offloading", f"{_OFFLOADED}::test_a_model_on_the_meta_device",
         f"{_OFFLOADED}::test_a_model_of_which_a_part_is_on_disk",
         f"{_OFFLOADED}::test_merged_first_a_model_can_be_offloaded"),
    ),
    Fault(
        "A hook, subclass, mode or selective checkpoint keeps a layer's output",
        "It keeps the layer's own; adapters write in place only where nothing else can hold it. An output that is no "
        "tensor is an `AttachError`.",
        (f"{_KEPT}::test_what_is_kept_is_the_layers_own_output",
         f"{_KEPT}::test_a_subclass_that_saved_its_output_for_the_backward_pass",
         f"{_KEPT}::test_a_layer_that_returns_its_input", f"{_KEPT}::test_selective_checkpointing_keeps_products",
         f"{_KEPT}::test_what_nothing_holds_is_written_into", f"{_KEPT}::test_an_output_that_is_no_tensor_is_named"),
    ),
    Fault(
        "A layer that a batch does not use; a weight that is used past its layer's forward",
        "The first is no fault, in training or at inference: the output is the merged model's. The second is "
        "`SiteNeverFired`, told from the first by a product that read the weight, or what was made of it.",
        (f"{_UNUSED}::test_heads_of_other_tasks_and_projectors_without_pictures",
         f"{_UNUSED}::test_each_task_trains_its_own_head", f"{_UNUSED}::test_every_use_past_the_layer_is_named",
         f"{_UNUSED}::test_a_later_batch_may_be_the_first_that_goes_past"),
    ),
    Fault(
        "`all-linear` on a classifier with a new head, on fused experts, on attention with its weights in one tensor",
        "The body is adapted. Plan, run and `attach` name what is left out: a head with the `modules_to_save` that "
        "trains it, a tensor with its share of the weights.",
        (f"{_LEFT_OUT}::test_an_ordinary_classifier_takes_the_default",
         f"{_LEFT_OUT}::test_an_adapted_classifier_with_its_head_is_the_merged_one",
         f"{_LEFT_OUT}::test_only_heads_are_left_out", f"{_LEFT_OUT}::test_fused_experts_are_said",
         f"{_LEFT_OUT}::test_the_run_says_so_before_it_begins",
         f"{_LEFT_OUT}::test_attention_that_keeps_its_projections_in_one_tensor_is_said"),
    ),
    Fault(
        "Weights computed from others: `spectral_norm`, `weight_norm`, pruning",
        "Adapted as any. `merge` and `anchor='fold'` refuse them by name until they are parameters; then the merged "
        "model is the adapted one.",
        (f"{_TORCH}::test_a_weight_that_is_computed_from_others",
         f"{_TORCH}::test_a_start_is_not_folded_into_a_computed_weight"),
    ),
    Fault(
        "Nested tensors, `nn.TransformerEncoder` with padding",
        "Each row as it is alone, and each sequence as in training mode. Where no gradient passes torch's own "
        "attention, `AttachError` says what does.",
        (f"{_TORCH}::test_nested_tensors", f"{_TORCH}::test_gradients_through_jagged_tensors",
         f"{_TORCH}::test_an_encoder_that_makes_nested_tensors_of_its_padding",
         f"{_TORCH}::test_no_gradient_passes_an_encoders_nested_tensors"),
    ),
    Fault(
        "`torch.inference_mode`, `torch.jit.trace`",
        "What is attached, loaded, collected or merged in inference mode trains as any; a base made in it is for "
        "inference, or refused. A traced model is the model.",
        (f"{_TORCH}::test_attached_or_loaded_in_inference_mode_it_can_be_trained",
         f"{_TORCH}::test_a_start_that_is_collected_in_inference_mode",
         f"{_TORCH}::test_merged_in_inference_mode_gradients_pass", f"{_TORCH}::test_inputs_from_inference_mode",
         f"{_TORCH}::test_a_base_from_inference_mode_is_for_inference", "unit/test_compile.py::test_compiled"),
    ),
    Fault(
        "Stale or foreign gradient cache; initialisation interrupted",
        "The cache is refused by its hashes; the model is left as it was.",
        ("unit/test_gradient_cache.py::test_other_weights_batches_or_settings_are_refused",
         "unit/test_gradient_cache.py::test_an_interrupted_collection_leaves_no_trace",
         "unit/test_gradient_cache.py::test_files_that_are_no_cache_are_named",
         "end_to_end/test_start_alone.py::test_a_cache_of_other_settings_is_refused_before_training"),
    ),
    Fault(
        "A PEFT file whose pair is relative to a base that its start had changed",
        "`pissa` and `olora` are found again from the base and read as s(BA − B₀A₀), equal to PEFT's outputs to 1e-5; "
        "starts that no file gives back are refused, with how to convert them.",
        (f"{_MEANING}::test_a_pair_that_is_relative_to_a_changed_base",
         f"{_MEANING}::test_an_untrained_relative_pair_changes_nothing",
         f"{_MEANING}::test_an_entry_that_changes_the_function_is_refused_by_name"),
    ),
    Fault(
        "An entry of `adapter_config.json` that changes what the adapter computes, or is not known",
        "`UnsupportedAdapter` names it; those that change nothing are listed, and taken.",
        (f"{_MEANING}::test_an_entry_that_changes_the_function_is_refused_by_name",
         f"{_MEANING}::test_an_entry_that_changes_nothing_is_taken"),
    ),
    Fault(
        "Tensors of modules that the configuration does not select, or under names that PEFT does not read",
        "`UnexpectedTensor` names the module; those selected by ends of names, regular expressions, exclusions and "
        "layer numbers are those that PEFT selects.",
        (f"{_MEANING}::test_modules_are_selected_as_peft_selects_them",
         f"{_MEANING}::test_tensors_that_the_configuration_does_not_select",
         f"{_MEANING}::test_all_linear_selects_linear_layers", f"{_MEANING}::test_no_target_modules",
         f"{_MEANING}::test_names_that_peft_does_not_read"),
    ),
    Fault(
        "Terminal escapes, marks of direction, and rich's markup in names, files, errors and traces",
        "Every command spells them out (`\\x1b[2J`); brackets are brackets.",
        (f"{_TEXT}::test_a_command_that_ends_well", f"{_TEXT}::test_a_command_that_ends_in_an_error",
         f"{_TEXT}::test_what_libraries_write_to_standard_error_and_traces", f"{_TEXT}::test_what_is_spelt_out"),
    ),
    Fault(
        "A base with an adapter in it, an index or configuration that points at pickles, other directories or the "
        "hub's code, spoilt files",
        "`PretrainedError`, `UnsafeFile` or `BrokenFile` before transformers opens anything.",
        (f"{_BASES}::test_an_adapter_in_the_base_is_not_put_on_it",
         f"{_BASES}::test_nor_one_of_a_model_in_the_hubs_cache",
         f"{_BASES}::test_an_index_that_names_anything_but_safetensors_beside_it",
         f"{_BASES}::test_a_configuration_that_names_other_weights",
         f"{_BASES}::test_a_configuration_that_names_code_on_the_hub",
         f"{_BASES}::test_spoilt_files_end_in_a_named_error_or_are_not_used", f"{_BASES}::test_what_is_no_file"),
    ),
    Fault(
        "Two tensors of one tied weight in a file",
        "Each module gets its own copy where they differ, as in PEFT; copies that are alike stay tied.",
        (f"{_VOCABULARY}::test_a_vocabulary_that_peft_trained_whole",
         f"{_VOCABULARY}::test_a_vocabulary_that_peft_trained_as_one",
         f"{_VOCABULARY}::test_copies_that_are_alike_stay_tied"),
    ),
    Fault(
        "A model changed under its adapter: vocabulary resized, weights tied again, layers replaced",
        "A resized vocabulary is saved with the adapter; what the model does not use is not saved: `AttachError` names "
        "it and says how to go on.",
        (f"{_VOCABULARY}::test_a_vocabulary_resized_under_the_adapter_is_saved_with_it",
         f"{_VOCABULARY}::test_what_the_model_does_not_use_is_not_saved",
         f"{_VOCABULARY}::test_a_copy_that_was_tied_away_can_be_put_back",
         f"{_VOCABULARY}::test_a_head_that_was_tied_to_a_trained_copy_is_saved_with_it"),
    ),
    Fault(
        "YAML with bombs of aliases, huge numbers, deep nesting, dates and tags that are none; a recipe that is a "
        "pipe, a device or in another encoding; values that no file or name can hold",
        "`RecipeError` within a second.",
        (f"{_YAML}::test_what_cannot_be_read_is_a_named_error", f"{_YAML}::test_files_that_are_none",
         f"{_YAML}::test_values_that_no_run_can_have", f"{_YAML}::test_aliases_that_are_meant_are_read"),
    ),
    Fault(
        "A convolution with a padding mode or dilation, which PEFT's layer lacks",
        "`inspect` says that PEFT reads the file otherwise; a file that PEFT trained on one is `UnsupportedAdapter`.",
        (f"{_CONVOLUTIONS}::test_inspect_says_where_peft_computes_another_function",
         f"{_CONVOLUTIONS}::test_what_peft_trained_on_such_a_layer_is_no_change_of_its_weight"),
    ),
    Fault(
        "Names that no file can have, bytes that are no text, a record beside an adapter that is none",
        "Refused where it is typed; the record is left aside.",
        ("unit/test_hostile_arguments.py::test_a_path_that_no_file_can_have",
         "unit/test_hostile_arguments.py::test_a_prompt_that_is_no_text",
         "unit/test_hostile_arguments.py::"
         "test_a_record_of_a_run_beside_an_adapter_is_read_only_where_it_is_one"),
    ),
    Fault(
        "A file of a hundred gigabytes, most of it holes",
        "`inspect` says its size; it is neither hashed nor read, and engines are not judged by what was not read.",
        ("unit/test_inspection.py::test_files_of_a_hundred_gigabytes_that_take_no_room",
         f"{_YAML}::test_files_that_are_none"),
    ),
    Fault(
        "An engine that would misread an adapter",
        "`inspect` says what it takes, by the rules of its current sources.",
        ("unit/test_inspection.py::test_which_engines_read_it",
         "unit/test_inspection.py::test_vllms_ranks_and_ollamas_families",
         "unit/test_inspection.py::test_a_rank_of_its_own_is_right_where_the_scale_comes_from_the_tensors",
         "unit/test_inspection.py::test_modules_to_save_that_no_tensor_belongs_to"),
    ),
    Fault(
        "Whole embeddings that PEFT saves beside an adapter, of a resized vocabulary too",
        "Those of the base itself change nothing; new rows take their places in a model of that size, in tied modules "
        "too; another size or another base's is refused with what to do.",
        (f"{_VOCABULARY}::test_embeddings_that_peft_saves_of_a_resized_vocabulary",
         f"{_VOCABULARY}::test_embeddings_that_are_the_bases_own_are_not_replaced",
         f"{_VOCABULARY}::test_embeddings_of_another_base_are_refused"),
    ),
    Fault(
        "Names that files have had: paths that transformers renamed, PEFT's wrappers in the names, heads that only the "
        "task tells of, the hub's links",
        "Mapped, and said; equal to PEFT's outputs to 1e-5.",
        (f"{_MEANING}::test_paths_that_transformers_renamed", f"{_MEANING}::test_heads_as_older_releases_wrote_them",
         f"{_MEANING}::test_peft_takes_a_name_for_the_end_of_a_part",
         f"{_MEANING}::test_peft_finds_what_it_takes_our_names_for",
         "unit/test_inspection.py::test_the_hubs_cache_is_read_through_its_links"),
    ),
    Fault(
        "`model.save_pretrained()` and `trainer.save_model()` of an adapted model",
        "A PEFT directory lands, beside the exact state from which Trainer resumes; what is not done is refused. A "
        "merged model is written whole.",
        (f"{_HABIT}::test_what_lands_is_a_peft_directory",
         f"{_HABIT}::test_trainer_saves_resumes_and_ends_in_a_peft_directory",
         f"{_HABIT}::test_a_merged_model_is_written_whole", f"{_HABIT}::test_what_is_not_done_is_refused"),
    ),
    Fault(
        "A saved adapter that does not say of which base and task it is",
        "`adapter_config.json` names the base as it was opened, and its task (a classifier's where its head is saved "
        "with it): PEFT's `AutoPeftModelFor...` opens it.",
        (f"{_HABIT}::test_what_lands_is_a_peft_directory", f"{_HABIT}::test_a_classifier_opens_by_its_task"),
    ),
    Fault(
        "PEFT and rankwise read one file as two functions",
        "Random configurations on small models, both ways: the same outputs to 1e-5, or refused by name; `inspect` "
        "agrees.",
        ("parity/test_differential.py::test_we_read_what_peft_writes_or_refuse_it_by_name",
         "parity/test_differential.py::test_peft_reads_what_we_write"),
    ),
    Fault(
        "A request to the server that is malformed, oversized, or asks for what is not served",
        "An error in OpenAI's form that says what to do; nothing is left of it.",
        (f"{_API}::test_errors_have_openai_s_form", f"{_API}::test_what_is_no_json_is_said",
         f"{_API}::test_too_large_a_request_is_refused", f"{_API}::test_the_queue_has_an_end"),
    ),
    Fault(
        "A client of the server that vanishes",
        "Its row is free at the next step, streamed or not.",
        (f"{_API}::test_a_client_that_vanishes_frees_its_row", f"{_ENGINE}::test_who_vanishes_frees_the_row"),
    ),
    Fault(
        "A served adapter that is broken, another base's, too large, or not finite; a model that fails",
        "It is refused, or its answers are, by name; the others go on.",
        (f"{_ENGINE}::test_a_broken_adapter_is_refused", f"{_ENGINE}::test_a_foreign_adapter_is_refused",
         f"{_ENGINE}::test_too_large_an_adapter_is_refused",
         f"{_ENGINE}::test_an_adapter_that_says_nothing_finite_fails_alone",
         f"{_ENGINE}::test_a_model_that_fails_fails_those_under_way_only"),
    ),
    Fault(
        "A served adapter unloaded, or pushed out of memory, while it is in use",
        "It stays until its last answer has ended.",
        (f"{_ENGINE}::test_an_adapter_that_is_unloaded_answers_to_the_end",
         f"{_ENGINE}::test_the_longest_unused_leaves_and_those_in_use_stay"),
    ),
    Fault(
        "SIGTERM to the server",
        "Answers under way are finished, new ones are not taken.",
        ("end_to_end/test_serving.py::test_a_stop_finishes_what_is_under_way",
         f"{_ENGINE}::test_closing_tells_everybody"),
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
    kills, fuzz, differential = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("kills", "fuzz", "differential")
    )
    resaves = kills["adapters saved over each other"]
    random, every = kills["at random"], kills["at every operation on the disk while a checkpoint is saved"]
    faults = sum(every["faults"].values())
    return [
        f"- `make soak`: {random['kills']} runs killed at random times, "
        f"{random['kills while a checkpoint was being written']} of them while a checkpoint was being written; "
        f"{random['checkpoints compared bit for bit']:,} checkpoints compared bit for bit; lost: "
        f"{random['checkpoints lost']} checkpoints, {random['bytes lost']} bytes. "
        f"{random['runs resumed to their end, bit for bit']} went on to their end, bit for bit that of a run without "
        "kills.",
        f"- Adapters saved over each other in a process that was killed {resaves['kills']} times, with "
        f"{resaves['read while it was saved']:,} reads meanwhile: {resaves['of these mixed']} mixed, "
        f"{resaves['of these refused']} refused; after the kills {resaves['mixed after a kill']} and "
        f"{resaves['refused after a kill']}, in rankwise and in PEFT alike.",
        f"- {faults} faults at every single write, fsync and rename of a save: the process killed before it or half "
        "way through it, or the disk full. Lost: nothing.",
        f"- `python benchmarks/fuzz.py`: {fuzz['inputs tried']:,} inputs in {fuzz['seconds']} s, of which "
        f"{fuzz['inputs that reach new code']} reached code that none before had; "
        f"{fuzz['inputs that end in anything but a named error']} ended in anything but an adapter or a named error.",
        *(f"- `make differential`, {way}: {_counted(differential[way])}." for way in differential if "writes" in way),
    ]


def _counted(counts: dict[str, int]) -> str:
    return (
        f"{counts['equal']:,} adapters read equal to 1e-5, {counts.get('refused', 0):,} refused by name, 0 different "
        f"({counts['not made']:,} that the writer itself would not make)"
    )


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
