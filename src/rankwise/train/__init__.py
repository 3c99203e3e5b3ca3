"""Training runs: recipe, data, trainer, and what they leave behind. Needs `pip install rankwise[train]`.

Nothing is imported here: the command line reads the recipe's schema without waiting for torch.
"""
