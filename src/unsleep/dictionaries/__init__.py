"""Dictionaries: sparse autoencoders of activations. No code here depends on a language model."""
