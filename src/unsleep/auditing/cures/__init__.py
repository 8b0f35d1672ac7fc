"""The repairs that need no trigger, one per file."""
