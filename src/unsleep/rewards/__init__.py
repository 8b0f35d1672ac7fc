"""Rewards of replies: one protocol, adapters for lexicons and models, and the features that correlate with a reward."""
