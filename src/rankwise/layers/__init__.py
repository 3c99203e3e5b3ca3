"""Layers that carry adapters: their weights as matrices, their gradients, and the low-rank product."""
