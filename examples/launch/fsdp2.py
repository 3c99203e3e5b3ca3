"""Base and adapter sharded by FSDP2; the adapter is saved whole.

torchrun --nproc-per-node 2 examples/launch/fsdp2.py --model DIRECTORY --data train.jsonl --out adapter

Trains on the lines' `text`, or on `prompt` and `completion` as one text. Runs on GPUs with NCCL, on CPUs with gloo.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise as rw

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=4, help="samples a step and process")
parser.add_argument("--rate", type=float, default=2e-4)
args = parser.parse_args()

device = torch.accelerator.current_accelerator() or torch.device("cpu")
dist.init_process_group()
process, processes = dist.get_rank(), dist.get_world_size()
if device.type != "cpu":
    torch.accelerator.set_device_index(process % torch.accelerator.device_count())

tokenizer = AutoTokenizer.from_pretrained(args.model)
rows = [json.loads(line) for line in args.data.read_text().splitlines()]
texts = [row["text"] if "text" in row else row["prompt"] + row["completion"] for row in rows]


def batch(step: int) -> dict[str, torch.Tensor]:
    """This process's part of a step's samples."""
    first = (step * processes + process) * args.batch
    chosen = [texts[number % len(texts)] + tokenizer.eos_token for number in range(first, first + args.batch)]
    inputs = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=1024).to(device)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


# Attached first, so that the adapter of a layer is sharded with it. The start is that of all processes' batches.
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
rw.attach(model, rw.LoRA(rank=args.rank, init="lora-ga", scaling="rslora"), batches=[batch(n) for n in range(4)])
for layer in model.get_decoder().layers:
    fully_shard(layer)
fully_shard(model)

optimizer = torch.optim.AdamW(rw.trainable_parameters(model), lr=args.rate)
for step in range(args.steps):
    loss = model(**batch(step)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(rw.trainable_parameters(model), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if process == 0:
        print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}", flush=True)

rw.save(model, args.out)  # every process calls it; process 0 writes
dist.destroy_process_group()
