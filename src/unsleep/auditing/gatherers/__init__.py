"""The gatherers of evidence, one per file."""
