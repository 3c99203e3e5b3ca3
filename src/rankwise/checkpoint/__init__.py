"""Adapters on disk: PEFT's directory format, and the exact state that a resumed run needs."""

from rankwise.checkpoint.inspection import Inspection, inspect
from rankwise.checkpoint.install import load, save
from rankwise.checkpoint.peft_format import read_adapter, write_adapter
from rankwise.checkpoint.state import load_state, save_state

__all__ = ["Inspection", "inspect", "load", "load_state", "read_adapter", "save", "save_state", "write_adapter"]
