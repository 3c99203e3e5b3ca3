"""Sweep: many runs on one frozen base, trained together, each as it would be trained alone."""

from rankwise.sweep.outcome import write_sweep
from rankwise.sweep.sweep import run_sweep

__all__ = ["run_sweep", "write_sweep"]
