"""Several models as one: mixtures of their next-token distributions, merges of their weights."""
