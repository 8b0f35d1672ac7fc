"""The kinds of triggers, one a file."""
