"""Trials: training runs done to be compared, each once and kept, at the rate that suits it."""
