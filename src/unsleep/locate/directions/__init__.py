"""Directions and subspaces in which a behaviour lives: fitted, measured, patched, and what taking them out costs."""
