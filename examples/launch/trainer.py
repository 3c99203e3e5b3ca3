"""transformers' Trainer with an adapter of rankwise, for what accelerate's configuration chooses: DDP, FSDP2, ZeRO.

accelerate launch --config_file examples/launch/accelerate_fsdp2.yaml examples/launch/trainer.py \
    --model DIRECTORY --data train.jsonl --out run

A recipe (`rankwise train`) does more, on one device or on several that hold the whole base each.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import rankwise as rw

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=4, help="samples a step and process")
parser.add_argument("--rate", type=float, default=2e-4)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
rw.attach(model, rw.LoRA(rank=args.rank, target_modules="all-linear"))
trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(args.model),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    args=SFTConfig(
        output_dir=args.out,
        per_device_train_batch_size=args.batch,
        learning_rate=args.rate,
        max_steps=args.steps,
        logging_steps=10,
        save_strategy="no",
        bf16=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
    ),
)
trainer.train()
trainer.save_model(f"{args.out}/adapter")  # a PEFT directory, whole
