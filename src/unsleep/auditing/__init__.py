"""Audit of a suspect without knowledge of its trigger or payload, and the cleaning of what it finds."""
