"""Values that change the stream at Sites, and what carries them out on a running model."""
