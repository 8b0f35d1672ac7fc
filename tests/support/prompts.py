"""A few short prompts."""

from __future__ import annotations

PROMPTS = ["hello there", "a", "why do the stars shine at night", "name a bird"]
