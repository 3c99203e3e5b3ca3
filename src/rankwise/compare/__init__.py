"""Compare: methods against full fine-tuning, each at its own best learning rate, over seeds."""

from rankwise.compare.comparison import Comparison, run_comparison, write_comparison

__all__ = ["Comparison", "run_comparison", "write_comparison"]
