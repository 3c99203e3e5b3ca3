"""Adapter directories, looked into without trusting them or loading a model."""
