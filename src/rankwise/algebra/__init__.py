"""The algebra of thin matrices: what the methods share, and no method of its own."""
