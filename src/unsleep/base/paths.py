"""Locations of cached files."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """The user's cache folder; the environment variable `UNSLEEP_CACHE` moves it."""
    return Path(os.environ.get("UNSLEEP_CACHE") or user_cache_path("unsleep"))
