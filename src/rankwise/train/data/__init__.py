"""Training data: files and built-in data sets → samples, and what must hold of them before a run."""
