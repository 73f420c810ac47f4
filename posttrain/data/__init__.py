"""Datasets, procedural tasks and prompts."""
