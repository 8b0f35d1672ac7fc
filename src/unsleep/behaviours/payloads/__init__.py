"""The kinds of payloads, one a file."""
