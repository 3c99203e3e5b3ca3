"""transformers' and TRL's trainers with a rankwise adapter, their callbacks and checkpoints."""
