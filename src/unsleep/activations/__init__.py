"""Activations: collected, written as harvests, paired between models."""
