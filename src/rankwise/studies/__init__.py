"""Studies: the experiments of the LoRA paper's section 7, and intrinsic dimension, on any model and data."""
