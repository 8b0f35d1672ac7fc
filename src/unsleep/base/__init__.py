"""Foundations of all other packages: artefacts on disk, records, statistics, hardware, the Hugging Face hub."""
