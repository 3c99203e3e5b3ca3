"""Adapters on disk: PEFT's directory format, and the exact state that a resumed run needs."""
