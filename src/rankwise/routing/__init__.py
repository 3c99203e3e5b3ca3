"""Rows of one batch that belong to different adapters."""
