"""The algebra of low-rank matrices."""
