"""Experiments: questions about backdoors, each answered by one command with arms, controls and replicates."""
