"""`learning_rate: auto`: a first guess from rules, then a short probe before the first step."""
