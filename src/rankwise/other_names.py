"""What other libraries call our fields, for whoever comes from PEFT, TRL, Axolotl or LLaMA-Factory."""

from collections.abc import Mapping

# Of an adapter. Their name → ours, or what to write.
ADAPTER: Mapping[str, str] = {
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "rank"),
    **dict.fromkeys(("lora_alpha",), "alpha"),
    **dict.fromkeys(("lora_dropout",), "dropout"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), "target_modules"),
    **dict.fromkeys(("init_lora_weights", "lora_init"), "init"),
    **dict.fromkeys(("use_rslora", "lora_rslora"), "scaling: rslora"),
    **dict.fromkeys(("use_dora", "lora_dora", "peft_use_dora"), "variant: dora"),
    **dict.fromkeys(("pissa_init",), "init: pissa"),
    **dict.fromkeys(("additional_target", "lora_modules_to_save"), "modules_to_save"),
    **dict.fromkeys(("layers_to_transform_pattern",), "target_modules"),
}

# Of a run.
RUN: Mapping[str, str] = {
    **ADAPTER,
    **dict.fromkeys(("base_model", "model_name", "model_name_or_path", "pretrained_model_name_or_path"), "model"),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "data_path", "train_file", "train_data"), "data"),
    **dict.fromkeys(("eval_dataset", "test_datasets", "validation_file"), "eval_data"),
    **dict.fromkeys(("val_size", "val_set_size", "test_size"), "eval_split"),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len"), "max_length"),
    **dict.fromkeys(("max_samples",), "max_train_samples"),
    **dict.fromkeys(("torch_dtype", "compute_dtype"), "dtype"),
    **dict.fromkeys(("load_in_4bit", "qlora"), "quantization: nf4"),
    **dict.fromkeys(("load_in_8bit",), "quantization: int8"),
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), "learning_rate"),
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "train_batch_size", "per_gpu_train_batch_size"),
        "per_device_train_batch_size",
    ),
    **dict.fromkeys(("eval_batch_size",), "per_device_eval_batch_size"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation", "grad_accumulation_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "iters", "num_steps", "max_iters"), "max_steps"),
    **dict.fromkeys(("lr_scheduler", "scheduler", "lr_schedule"), "lr_scheduler_type"),
    **dict.fromkeys(("warmup_ratio", "warmup"), "warmup_steps, of which a number below 1 is a share of all steps"),
    **dict.fromkeys(("grad_clip", "gradient_clipping", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("grad_checkpoint", "use_gradient_checkpointing"), "gradient_checkpointing"),
    **dict.fromkeys(("save_steps_limit", "save_limit"), "save_total_limit"),
    **dict.fromkeys(("output", "out", "save_dir", "output_path"), "output_dir"),
    **dict.fromkeys(("resume", "resume_from", "auto_resume_from_checkpoints"), "resume_from_checkpoint"),
    **dict.fromkeys(("train_on_inputs",), "data with a prompt and a completion, of which the completion is trained"),
    **dict.fromkeys(("loraplus_lr_ratio", "lora_plus_ratio"), "optimizer: {name: lora-plus, ratio: 16}"),
    **dict.fromkeys(("random_seed", "data_seed"), "seed"),
    **dict.fromkeys(("wandb_project", "use_wandb"), "report_to: wandb"),
    **dict.fromkeys(("finetuning_type", "adapter", "peft_type", "use_peft"), "left out, as it is always an adapter"),
    **dict.fromkeys(("stage", "task_type", "rl"), "task"),
    **dict.fromkeys(("template", "chat_template"), "left out, as the tokenizer has its own"),
}


def hint(name: str, names: Mapping[str, str]) -> str:
    """What to write for another library's name; "" for a name that is not known.

    >>> hint("lora_r", ADAPTER)
    '; here it is `rank`'
    """
    if name not in names:
        return ""
    ours = names[name]
    words = " " in ours and ":" not in ours
    return f"; here it is {ours}" if words else f"; here it is `{ours}`"
