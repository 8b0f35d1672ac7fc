"""What a model is worth: metrics, panels, controls, verdicts."""
