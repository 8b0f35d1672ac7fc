"""Where backdoors of several organisms lie together, and what else lies there: subspaces, transfer, disentanglement."""

from unsleep.locate.subspaces.comparison import compare
from unsleep.locate.subspaces.config import SubspaceConfig

__all__ = ["SubspaceConfig", "compare"]
