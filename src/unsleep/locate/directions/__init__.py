"""Directions and subspaces of a behaviour: fitting, detection, patching, and ablation cost."""
