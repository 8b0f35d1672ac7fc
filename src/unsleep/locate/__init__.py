"""Localisation of a behaviour in a model: features, directions, model diffs, activation patching, subspaces."""
