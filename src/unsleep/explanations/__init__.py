"""Explanations of features: statistics over text, predicates, scores, classes."""
