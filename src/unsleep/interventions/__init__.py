"""Interventions on a running model's activations: composable values, saved and loaded alike."""

from unsleep.interventions.features import Edit
from unsleep.interventions.files import load_edit, save_edit
from unsleep.interventions.intervention import Intervention, applied
from unsleep.interventions.steering import Steering
from unsleep.interventions.subspaces import Projection

__all__ = ["Edit", "Intervention", "Projection", "Steering", "applied", "load_edit", "save_edit"]
