"""Sparse feature circuits: by which features, at which tokens, a trigger becomes a payload."""
