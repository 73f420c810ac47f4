"""Rollout engines and what flows through them."""
