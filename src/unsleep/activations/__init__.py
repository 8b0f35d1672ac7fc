"""Activations: collected in memory, harvested to disk, paired between models."""
