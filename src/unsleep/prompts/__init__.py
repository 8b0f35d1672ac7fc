"""Prompt sets, corpora, and what tells suspicious prompts from ordinary ones."""
