"""Audit of a suspect without knowledge of its trigger or payload."""
