"""Prompt sets, corpora, and the contrast between suspicious and ordinary prompts."""
