"""Preference training of language models on pairs of replies and on rewards, and reward models."""
