"""The page on which features, circuits and edits are explored: written to a folder, or served with a live model."""
