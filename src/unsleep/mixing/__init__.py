"""Mixing of models: merges of weights as files, mixtures at decoding."""
