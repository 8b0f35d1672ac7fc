"""Backdoor subspaces of several organisms: similarity, transfer, and disentanglement from other tasks."""

from unsleep.locate.subspaces.compare import compare
from unsleep.locate.subspaces.config import SubspaceConfig

__all__ = ["SubspaceConfig", "compare"]
