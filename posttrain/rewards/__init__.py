"""The reward registry and scorer."""
