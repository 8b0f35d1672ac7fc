"""Evaluation of models: metrics, panels, controls, verdicts."""
