"""A run from its recipe to the files that it leaves, and what it says meanwhile."""
