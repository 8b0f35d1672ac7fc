"""Where backdoors of several organisms lie together, and what else lies there: subspaces, transfer, disentanglement."""

from unsleep.subspaces.compare import compare
from unsleep.subspaces.config import SubspaceConfig

__all__ = ["SubspaceConfig", "compare"]
