"""The kinds of payloads, one per file."""
